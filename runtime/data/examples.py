"""Training data: lines of a JSONL file become token ids and labels of one fixed shape.

Each line is one JSON object in one of three forms; keys that belong to no form are ignored, blank lines too:

``{"prompt": ..., "completion": ...}``
    Loss on the completion only. With a chat template in the tokenizer the prompt is the user's turn and the completion
    the assistant's; without one, or with ``raw``, the two strings are joined as they stand (no space is put between
    them) and the end-of-text token follows.
``{"text": ...}``
    Loss on every token; the end-of-text token follows.
``{"messages": [{"role": ..., "content": ...}, ...]}``
    Through the chat template, loss on every assistant turn. A turn is found as the difference between the conversation
    rendered with and without it, so templates need no assistant masks. Templates that rewrite earlier turns (some drop
    past reasoning) have no such difference inside one text; there a line becomes one example per assistant turn, each
    in exactly the context that the model would see when asked for that turn.

Letters: ``B`` micro-batch, ``S`` sequence length. Every batch is ``[B, S]`` exactly, padded on the right: the plan's
``T = B*S`` holds for each step. Which examples form the batch of a step is a pure function of the step, so a resumed
run goes on with the very batch that it would have seen.
"""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from meft.planner.base.errors import UsageError
from meft.runtime.data.chat_template import TemplateError, rendered

IGNORE_INDEX = -100
"""Label of a token that carries no loss; Hugging Face's and torch's own value."""

MAX_REPORTED_LINES = 5
ROLES = ("system", "user", "assistant", "tool")
ACCEPTED = (
    'each line must be one JSON object: {"prompt": "...", "completion": "..."} or {"text": "..."} '
    'or {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}'
)
_FORMS = (("prompt", "completion"), ("text",), ("messages",))


class Tokenizer(Protocol):
    """What this module needs of a Hugging Face tokenizer."""

    @property
    def chat_template(self) -> Any:
        """The Jinja template of a conversation; None when the tokenizer has none."""

    @property
    def eos_token_id(self) -> Any:
        """Id of the end-of-text token, or None."""

    @property
    def pad_token_id(self) -> Any:
        """Id of the padding token, or None."""

    @property
    def encode(self) -> Callable[..., list[int]]:
        """``encode(text, add_special_tokens=...)``: token ids."""

    @property
    def apply_chat_template(self) -> Callable[..., Any]:
        """``apply_chat_template(messages, tokenize=False, add_generation_prompt=...)``: the rendered text."""


Message = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Completion:
    """A line of the form ``{"prompt", "completion"}``."""

    prompt: str
    completion: str


@dataclass(frozen=True, slots=True)
class Text:
    """A line of the form ``{"text"}``."""

    text: str


@dataclass(frozen=True, slots=True)
class Chat:
    """A line of the form ``{"messages"}``."""

    messages: tuple[Message, ...]


Record = Completion | Text | Chat


@dataclass(frozen=True, slots=True)
class Example:
    """One sequence: token ids and, for each, its label (the id itself, or :data:`IGNORE_INDEX`)."""

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]

    @property
    def num_trained_tokens(self) -> int:
        """Tokens that carry loss. The first token never does: a causal model predicts it from nothing."""
        return sum(label != IGNORE_INDEX for label in self.labels[1:])

    def truncated(self, seq_len: int) -> Example:
        """Return the first ``seq_len`` tokens."""
        return Example(self.input_ids[:seq_len], self.labels[:seq_len])


@dataclass(frozen=True, slots=True)
class DataStatistics:
    """What a file held, for the report and for choosing ``seq_len``; token counts without padding."""

    num_lines: int
    num_examples: int
    longest_tokens: int  # before truncation
    sequence_tokens: tuple[int, ...]  # before truncation, at the deciles: from the shortest to the longest
    truncated_examples: int  # longer than seq_len: their end was cut off
    dropped_examples: int  # no token with loss was left within seq_len
    num_tokens: int
    num_trained_tokens: int

    def summary(self, seq_len: int) -> str:
        """Render one line for a person."""
        text = f"{self.num_examples:,} examples, {self.num_trained_tokens:,} of {self.num_tokens:,} tokens with loss"
        text += f"; longest {self.longest_tokens:,} tokens for sequences of {seq_len:,}"
        if self.truncated_examples:
            text += f", {self.truncated_examples:,} cut off"
        if self.dropped_examples:
            text += f", {self.dropped_examples:,} left out (nothing to learn within the sequence)"
        return text


@dataclass(frozen=True, slots=True)
class Dataset:
    """The usable examples of a file, each at most ``seq_len`` long, in the order of the file."""

    examples: tuple[Example, ...]
    statistics: DataStatistics


@dataclass(frozen=True, slots=True)
class Batch:
    """One micro-batch: three int64 tensors ``[B, S]``; padding has mask 0 and label :data:`IGNORE_INDEX`."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor

    @property
    def num_trained_tokens(self) -> int:
        """Tokens that carry loss (see :attr:`Example.num_trained_tokens`)."""
        return int((self.labels[:, 1:] != IGNORE_INDEX).sum())


class BadLineError(ValueError):
    """A line that cannot be used; the text says what is wrong with it."""


# --- from a line to a record ---------------------------------------------------------------------------------------


def parse_record(line: str) -> Record:
    """Read one line. Raises :class:`BadLineError` when it is in none of the accepted forms."""
    value = _parse_object(line)
    forms = [form for form in _FORMS if not value.keys().isdisjoint(form)]
    if not forms:
        found = ", ".join(map(repr, value)) or "no keys"
        raise BadLineError(f"none of the keys 'prompt', 'completion', 'text', 'messages' is there (found {found})")
    if len(forms) > 1:
        mixed = " and ".join("/".join(form) for form in forms)
        raise BadLineError(f"mixes the forms {mixed}; keep one")
    if "messages" in value:
        return Chat(_parse_messages(value["messages"]))
    if "text" in value:
        return Text(_string(value, "text"))
    return Completion(prompt=_string(value, "prompt", may_be_empty=True), completion=_string(value, "completion"))


def _parse_object(line: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise BadLineError(f"not JSON ({error.msg} at column {error.colno})") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; thousands of brackets
        raise BadLineError(f"not JSON that can be read ({error})") from None
    if not isinstance(value, dict):
        raise BadLineError(f"a JSON {_json_type(value)}, not an object")
    return value


def _json_type(value: object) -> str:
    names = {list: "list", dict: "object", str: "string", bool: "boolean", int: "number", float: "number"}
    return names.get(type(value), "null")


def _string(value: Mapping[str, Any], key: str, *, may_be_empty: bool = False) -> str:
    if key not in value:
        raise BadLineError(f"the key {key!r} is missing")
    text = value[key]
    if not isinstance(text, str):
        raise BadLineError(f"{key!r} is a {_json_type(text)}, not a string")
    if not may_be_empty and not text.strip():
        raise BadLineError(f"{key!r} is empty")
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON can spell half a surrogate pair; no tokenizer can read one
        raise BadLineError(f"{key!r} holds half of a surrogate pair (\\ud800 to \\udfff)") from None
    return text


def _parse_messages(value: object) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise BadLineError("'messages' must be a list of at least a user's and an assistant's message")
    for number, message in enumerate(value, 1):
        if not isinstance(message, dict):
            raise BadLineError(f"message {number} is a {_json_type(message)}, not an object with role and content")
        try:
            role = _string(message, "role")
            _string(message, "content", may_be_empty=role != "assistant")
        except BadLineError as error:
            raise BadLineError(f"message {number}: {error}") from None
        if role not in ROLES:
            raise BadLineError(f"message {number}: unknown role {role!r}; known: {', '.join(ROLES)}")
    if value[0]["role"] == "assistant":
        raise BadLineError("the first message is the assistant's; a conversation starts with system or user")
    if all(message["role"] != "assistant" for message in value):
        raise BadLineError("no message has the role 'assistant', so there is nothing to learn")
    return tuple(value)


# --- from a record to examples -------------------------------------------------------------------------------------


def tokenize_record(record: Record, tokenizer: Tokenizer, *, raw: bool = False) -> list[Example]:
    """Turn a record into examples of full length: one, or one per assistant turn (see the module's text).

    Raises :class:`BadLineError` when the chat template is missing or refuses the conversation.
    """
    if isinstance(record, Text):
        return [_plain_example(tokenizer, prompt=None, text=record.text)]
    if isinstance(record, Completion):
        if raw or tokenizer.chat_template is None:
            return [_plain_example(tokenizer, prompt=record.prompt, text=record.prompt + record.completion)]
        turns = ({"role": "user", "content": record.prompt}, {"role": "assistant", "content": record.completion})
        return _chat_examples(tokenizer, turns)
    if tokenizer.chat_template is None:
        raise BadLineError("'messages' needs a chat template and this tokenizer has none; use prompt/completion")
    return _chat_examples(tokenizer, record.messages)


def _plain_example(tokenizer: Tokenizer, *, prompt: str | None, text: str) -> Example:
    """Tokenize ``text`` with loss on what follows ``prompt`` (on everything when None), then the end of text."""
    ids = tokenizer.encode(text, add_special_tokens=True)
    start = 0 if prompt is None else _common_length(ids, tokenizer.encode(prompt, add_special_tokens=True))
    end_id = tokenizer.eos_token_id
    if end_id is not None and (not ids or ids[-1] != end_id):
        ids = [*ids, end_id]
    return _labelled(ids, [(start, len(ids))])


def _chat_examples(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[Example]:
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    full = _render(tokenizer, messages)
    heads = [_render(tokenizer, messages[:turn], add_generation_prompt=True) for turn in turns]
    last = len(messages) - 1
    ends = [full if turn == last else _render(tokenizer, messages[: turn + 1]) for turn in turns]
    if all(map(full.startswith, heads)) and all(map(full.startswith, ends)):
        return [_span_example(tokenizer, full, list(zip(heads, ends, strict=True)))]
    return [
        _span_example(tokenizer, end, [(_head_of(tokenizer, messages[:turn], head, end), end)])
        for turn, head, end in zip(turns, heads, ends, strict=True)
    ]


def _head_of(tokenizer: Tokenizer, before: Sequence[Message], head: str, end: str) -> str:
    """Return what comes before the last turn of ``end``: with the generation prompt, or else without it."""
    if end.startswith(head):
        return head
    plain = _render(tokenizer, before)
    if end.startswith(plain):
        return plain
    raise BadLineError(
        "the chat template changes the conversation before an assistant turn when that turn is added, "
        "so its tokens cannot be told apart; use text lines"
    )


def _render(tokenizer: Tokenizer, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
    try:
        return rendered(tokenizer, messages, add_generation_prompt=add_generation_prompt)
    except TemplateError as error:
        raise BadLineError(f"the tokenizer's chat template refuses it ({error})") from error


def _span_example(tokenizer: Tokenizer, full: str, spans: Sequence[tuple[str, str]]) -> Example:
    """Tokenize ``full`` with loss from the end of each span's first prefix to the end of its second."""
    ids = tokenizer.encode(full, add_special_tokens=False)  # the template writes its own

    def position(prefix: str) -> int:
        if prefix is full:  # the usual case, a conversation that ends with its only answer
            return len(ids)
        return _common_length(ids, tokenizer.encode(prefix, add_special_tokens=False))

    return _labelled(ids, [(position(head), position(end)) for head, end in spans])


def _common_length(ids: Sequence[int], prefix: Sequence[int]) -> int:
    """Length of the common prefix. A token that straddles the boundary differs, so it counts as completion."""
    pairs = zip(ids, prefix, strict=False)
    return next((index for index, (left, right) in enumerate(pairs) if left != right), min(len(ids), len(prefix)))


def _labelled(ids: Sequence[int], spans: Sequence[tuple[int, int]]) -> Example:
    labels = [IGNORE_INDEX] * len(ids)
    for start, stop in spans:
        labels[start:stop] = ids[start:stop]
    return Example(tuple(ids), tuple(labels))


# --- from a file to a data set -------------------------------------------------------------------------------------


def load_dataset(path: Path, tokenizer: Tokenizer, *, seq_len: int, raw: bool = False) -> Dataset:
    """Read a JSONL file into examples of at most ``seq_len`` tokens.

    Args:
        path: the file, UTF-8, one JSON object a line.
        tokenizer: the model's tokenizer.
        seq_len: the plan's sequence length; what is longer loses its end.
        raw: join prompt and completion as they stand, even when the tokenizer has a chat template.

    Raises:
        UsageError: no such file, an empty file, bad lines (the first ones are named, all are counted), or no line
            with a token to learn within ``seq_len``.
    """
    if seq_len < 2:
        raise UsageError(f"the sequence length must be at least 2 tokens to predict one from another, not {seq_len}")
    lines = _read_lines(Path(path))
    whole: list[Example] = []
    bad: list[str] = []
    for number, line in lines:
        try:
            whole += tokenize_record(parse_record(_decode(line)), tokenizer, raw=raw)
        except BadLineError as error:
            bad.append(f"{path}:{number}: {error}")
    if bad:
        raise _bad_lines_error(bad, num_lines=len(lines))
    return _dataset(whole, path=path, num_lines=len(lines), seq_len=seq_len)


def _read_lines(path: Path) -> list[tuple[int, bytes]]:
    """Return the lines that are not blank, with their numbers from 1."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise UsageError(f"data file {path} does not exist; {ACCEPTED}") from None
    except OSError as error:
        raise UsageError(f"data file {path} cannot be read: {error.strerror}; give a JSONL file") from None
    numbered = enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1)  # a byte order mark is no content
    lines = [(number, line) for number, line in numbered if line.strip()]
    if not lines:
        raise UsageError(f"data file {path} is empty; {ACCEPTED}")
    return lines


def _decode(line: bytes) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise BadLineError(f"not UTF-8 (byte {error.start + 1} of the line)") from None


def _bad_lines_error(bad: Sequence[str], *, num_lines: int) -> UsageError:
    shown = list(bad[:MAX_REPORTED_LINES])
    more = len(bad) - len(shown)
    if more:
        shown.append(f"and {more:,} more: {len(bad):,} of {num_lines:,} lines cannot be used")
    return UsageError("\n".join([*shown, ACCEPTED]))


def _dataset(whole: Sequence[Example], *, path: Path, num_lines: int, seq_len: int) -> Dataset:
    cut = [example.truncated(seq_len) for example in whole]
    kept = tuple(example for example in cut if example.num_trained_tokens)
    if not kept:
        needed = min(filter(None, map(_needed_tokens, whole)), default=None)
        hint = f"plan for sequences of at least {needed:,} tokens" if needed else "give lines of two tokens or more"
        raise UsageError(f"{path}: nothing to learn within {seq_len:,} tokens in any of {num_lines:,} lines; {hint}")
    statistics = DataStatistics(
        num_lines=num_lines,
        num_examples=len(kept),
        longest_tokens=max(len(example.input_ids) for example in whole),
        sequence_tokens=_deciles([len(example.input_ids) for example in whole]),
        truncated_examples=sum(len(example.input_ids) > seq_len for example in whole),
        dropped_examples=len(cut) - len(kept),
        num_tokens=sum(len(example.input_ids) for example in kept),
        num_trained_tokens=sum(example.num_trained_tokens for example in kept),
    )
    return Dataset(kept, statistics)


def _deciles(lengths: Sequence[int]) -> tuple[int, ...]:
    """Eleven lengths, from the shortest to the longest."""
    ascending = sorted(lengths)
    return tuple(ascending[round(tenth * (len(ascending) - 1) / 10)] for tenth in range(11))


def _needed_tokens(example: Example) -> int:
    """Tokens up to and with the first one that carries loss; 0 when none does."""
    trained = (index + 1 for index, label in enumerate(example.labels) if index and label != IGNORE_INDEX)
    return next(trained, 0)


# --- from a data set to batches ------------------------------------------------------------------------------------


def pad_token_id(tokenizer: Tokenizer) -> int:
    """Return the id to pad with: the padding token, or the end of text, or 0 (masked out in any case)."""
    candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(int(candidate) for candidate in candidates if candidate is not None)


def collate(examples: Sequence[Example], *, seq_len: int, pad_id: int) -> Batch:
    """Pad examples on the right into a batch ``[len(examples), seq_len]``, whatever their lengths.

    Raises:
        ValueError: an example is longer than ``seq_len``.
    """
    shape = (len(examples), seq_len)
    input_ids = torch.full(shape, pad_id, dtype=torch.int64)
    attention_mask = torch.zeros(shape, dtype=torch.int64)
    labels = torch.full(shape, IGNORE_INDEX, dtype=torch.int64)
    for row, example in enumerate(examples):
        length = len(example.input_ids)
        if length > seq_len:
            raise ValueError(f"example {row} has {length} tokens, more than seq_len {seq_len}")
        input_ids[row, :length] = torch.tensor(example.input_ids, dtype=torch.int64)
        attention_mask[row, :length] = 1
        labels[row, :length] = torch.tensor(example.labels, dtype=torch.int64)
    return Batch(input_ids, attention_mask, labels)


@functools.lru_cache(maxsize=2)  # a batch touches two epochs at most, unless it is larger than the data
def epoch_order(epoch: int, num_examples: int, seed: int) -> tuple[int, ...]:
    """Return the order of the examples in an epoch, the same on every machine and version.

    Python promises that a seeded ``random()`` repeats; it promises no such thing of ``shuffle``.
    """
    generator = random.Random(f"{seed}:{epoch}")
    keys = [generator.random() for _ in range(num_examples)]
    return tuple(sorted(range(num_examples), key=keys.__getitem__))


def batch_indices(step: int, *, num_examples: int, batch_size: int, seed: int) -> list[int]:
    """Return which examples form the batch of a step (counted from 0), a pure function of its arguments.

    The batches cut one endless sequence, shuffled anew every epoch, into pieces of exactly ``batch_size``, so every
    example is seen once per epoch and none is skipped at an epoch's end.
    """
    first = step * batch_size
    places = (divmod(position, num_examples) for position in range(first, first + batch_size))
    return [epoch_order(epoch, num_examples, seed)[offset] for epoch, offset in places]


def batches(
    examples: Sequence[Example],
    *,
    batch_size: int,
    seq_len: int,
    pad_id: int,
    seed: int,
    first_step: int = 0,
    last_step: int,
) -> Iterator[Batch]:
    """Yield the batches of steps ``first_step`` up to but not including ``last_step``, shape ``[B, S]`` each."""
    for step in range(first_step, last_step):
        chosen = batch_indices(step, num_examples=len(examples), batch_size=batch_size, seed=seed)
        yield collate([examples[index] for index in chosen], seq_len=seq_len, pad_id=pad_id)
