"""Training data: records become token ids and labels, and those become batches of one fixed shape.

:class:`~meft.runtime.data.records.Completion`
    Loss on the completion only. With a chat template in the tokenizer the prompt is the user's turn and the completion
    the assistant's; without one, or with ``raw``, the two strings are joined as they stand (own lines without anything
    between them, published formats with a line break) and the end-of-text token follows.
:class:`~meft.runtime.data.records.Text`
    Loss on every token; the end-of-text token follows.
:class:`~meft.runtime.data.records.Chat`
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
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from meft.runtime.data.records import BadLineError, Chat, Completion, Record, Text
from meft.runtime.data.template_fit import TemplateFit

IGNORE_INDEX = -100
"""Label of a token that carries no loss; Hugging Face's and torch's own value."""


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
    def decode(self) -> Callable[[list[int]], str]:
        """``decode(ids)``: the text of token ids."""

    @property
    def apply_chat_template(self) -> Callable[..., Any]:
        """``apply_chat_template(messages, tokenize=False, add_generation_prompt=...)``: the rendered text."""


@dataclass(frozen=True, slots=True)
class Example:
    """One sequence: token ids and, for each, its label (the id itself, or :data:`IGNORE_INDEX`).

    ``starts`` are the places where a document begins, several where short ones are packed into one sequence.
    """

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    starts: tuple[int, ...] = (0,)

    @property
    def num_trained_tokens(self) -> int:
        """Tokens that carry loss. The first token never does: a causal model predicts it from nothing."""
        return sum(label != IGNORE_INDEX for label in self.labels[1:])

    def truncated(self, seq_len: int) -> Example:
        """Return the first ``seq_len`` tokens, of one document."""
        return Example(self.input_ids[:seq_len], self.labels[:seq_len])


@dataclass(frozen=True, slots=True)
class Batch:
    """One micro-batch: three int64 tensors ``[B, S]``; padding has mask 0 and label :data:`IGNORE_INDEX`.

    ``starts``, bool ``[B, S]``, is where documents begin; None where every sequence holds one.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor
    starts: torch.Tensor | None = None

    @property
    def num_trained_tokens(self) -> int:
        """Tokens that carry loss (see :attr:`Example.num_trained_tokens`)."""
        return int((self.labels[:, 1:] != IGNORE_INDEX).sum())


# --- from a record to examples -------------------------------------------------------------------------------------


def tokenize_record(
    record: Record, tokenizer: Tokenizer, *, raw: bool = False, fit: TemplateFit | None = None
) -> list[Example]:
    """Turn a record into examples of full length: one, or one per assistant turn (see the module's text).

    ``fit`` says what a template may lose, and remembers what it loses; without it, nothing may be lost.

    Raises :class:`BadLineError` when the chat template is missing, refuses the conversation or loses part of it.
    """
    if isinstance(record, Text):
        return [_plain_example(tokenizer, prompt=None, text=record.text)]
    chat = _as_chat(record, tokenizer, raw=raw)
    if chat is None:
        assert isinstance(record, Completion)
        prompt = _plain_prompt(record)
        return [_plain_example(tokenizer, prompt=prompt, text=prompt + record.joined_by + record.completion)]
    fit = fit or TemplateFit(tokenizer)
    return _chat_examples(tokenizer, fit.fitted(chat), fit)


def kept_head(example: Example, record: Record, tokenizer: Tokenizer, *, raw: bool, fit: TemplateFit) -> int:
    """Leading tokens that stand before the prompt's own: what the tokenizer or the template begins with."""
    if isinstance(record, Text):
        return 0
    chat = _as_chat(record, tokenizer, raw=raw)
    if chat is None:
        return _common_length(example.input_ids, tokenizer.encode("", add_special_tokens=True))
    chat = fit.fitted(chat)
    first = next((place for place, message in enumerate(chat.messages) if message["role"] != "system"), 0)
    emptied = {**chat.messages[first], "content": ""}
    messages = (*chat.messages[:first], emptied, *chat.messages[first + 1 :])
    try:
        empty = fit.render(Chat(messages, chat.tools))
    except BadLineError:  # of empty messages
        return 0
    return _common_length(example.input_ids, tokenizer.encode(empty, add_special_tokens=False))


def _as_chat(record: Completion | Chat, tokenizer: Tokenizer, *, raw: bool) -> Chat | None:
    """The record as a conversation; None where its strings are joined as they stand."""
    if isinstance(record, Chat):
        if tokenizer.chat_template is None:
            raise BadLineError("'messages' needs a chat template and this tokenizer has none; use prompt/completion")
        return record
    if raw or tokenizer.chat_template is None:
        return None
    system = ({"role": "system", "content": record.system},) if record.system else ()
    asked, said = {"role": "user", "content": record.prompt}, {"role": "assistant", "content": record.completion}
    return Chat((*system, asked, said))


def _plain_prompt(record: Completion) -> str:
    return f"{record.system}\n\n{record.prompt}" if record.system else record.prompt


def _plain_example(tokenizer: Tokenizer, *, prompt: str | None, text: str) -> Example:
    """Tokenize ``text`` with loss on what follows ``prompt`` (on everything when None), then the end of text."""
    ids = tokenizer.encode(text, add_special_tokens=True)
    start = 0 if prompt is None else _common_length(ids, tokenizer.encode(prompt, add_special_tokens=True))
    end_id = tokenizer.eos_token_id
    if end_id is not None and (not ids or ids[-1] != end_id):
        ids = [*ids, end_id]
    return _labelled(ids, [(start, len(ids))])


def _chat_examples(tokenizer: Tokenizer, chat: Chat, fit: TemplateFit) -> list[Example]:
    messages = chat.messages
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    full = fit.render(chat)
    heads = [fit.render(chat, turn, add_generation_prompt=True) for turn in turns]
    last = len(messages) - 1
    ends = [full if turn == last else fit.render(chat, turn + 1) for turn in turns]
    learned = [turn not in chat.silent for turn in turns]
    if all(map(full.startswith, heads)) and all(map(full.startswith, ends)):
        spans = [span for span, wanted in zip(zip(heads, ends, strict=True), learned, strict=True) if wanted]
        return [_span_example(tokenizer, full, spans)]
    return [
        _span_example(tokenizer, end, [(_head_of(fit, chat, turn, head, end), end)])
        for turn, head, end, wanted in zip(turns, heads, ends, learned, strict=True)
        if wanted
    ]


def _head_of(fit: TemplateFit, chat: Chat, turn: int, head: str, end: str) -> str:
    """Return what comes before the last turn of ``end``: with the generation prompt, or else without it."""
    if end.startswith(head):
        return head
    plain = fit.render(chat, turn)
    if end.startswith(plain):
        return plain
    raise BadLineError(
        "the chat template changes the conversation before an assistant turn when that turn is added, "
        "so its tokens cannot be told apart; use text lines"
    )


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
    starts = torch.zeros(shape, dtype=torch.bool)
    for row, example in enumerate(examples):
        length = len(example.input_ids)
        if length > seq_len:
            raise ValueError(f"example {row} has {length} tokens, more than seq_len {seq_len}")
        input_ids[row, :length] = torch.tensor(example.input_ids, dtype=torch.int64)
        attention_mask[row, :length] = 1
        labels[row, :length] = torch.tensor(example.labels, dtype=torch.int64)
        starts[row, list(example.starts)] = True
    packed = any(len(example.starts) > 1 for example in examples)
    return Batch(input_ids, attention_mask, labels, starts if packed else None)


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
