"""From files to a data set: what each file is, its records, their examples, and what became of every token.

One look at a file tells its container and its format (:mod:`meft.runtime.data.containers`,
:mod:`meft.runtime.data.formats`); both are said, with the first example as it will be learned. Nothing is lost without
being counted: :class:`DataStatistics` adds up to the tokens in the files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from meft.planner.base.errors import UsageError
from meft.runtime.data.containers import sources
from meft.runtime.data.examples import IGNORE_INDEX, Example, Tokenizer, kept_head, tokenize_record
from meft.runtime.data.packing import cut, packed, windows
from meft.runtime.data.reading import Reading, bad_lines_error, open_source
from meft.runtime.data.records import BadLineError, Record, Text
from meft.runtime.data.template_fit import TemplateFit

Packing = Literal["text", "all", "none"]
MOST_CUT = 0.01
"""The share of examples that may lose part of themselves without being asked about."""
_SHOWN_CHARACTERS = 300


@dataclass(frozen=True)
class DataOptions:
    """How files are read."""

    raw: bool = False
    """Join prompt and completion as they stand, even when the tokenizer has a chat template."""
    stride: int | None = None
    """Tokens from the beginning of a long text's window to that of the next; None: a whole window."""
    packing: Packing | None = None
    """What is packed into full sequences: running text, everything, or nothing; None: running text, if there is room
    (see :mod:`meft.runtime.training.packing`)."""
    allow_cut: bool = False
    """Go on where more than 1 % of prompts and completions are too long."""
    allow_loss: tuple[str, ...] = ()
    """What a template may leave out: see :data:`meft.runtime.data.template_fit.KINDS`."""


@dataclass(frozen=True, slots=True)
class DataStatistics:
    """What the files held and what is learned of it; token counts without padding unless they say so."""

    num_lines: int
    num_examples: int  # sequences
    longest_tokens: int  # before anything was cut
    sequence_tokens: tuple[int, ...]  # at the deciles: of packed texts as they are, of others before they were cut
    truncated_examples: int  # prompts with completions, and conversations, that were longer than seq_len
    dropped_examples: int  # no token with loss was left
    num_tokens: int  # in sequences
    num_trained_tokens: int
    file_tokens: int  # of all lines, before anything was cut
    lost_tokens: int  # in no sequence
    repeated_tokens: int  # context that a window shares with the one before
    padded_tokens: int
    num_documents: int  # texts, and the windows of long ones
    left_out: int  # entries with nothing to learn
    template_losses: tuple[tuple[str, int], ...] = ()

    def summary(self, seq_len: int) -> str:
        """Render one line for a person."""
        text = f"{self.num_examples:,} examples, {self.num_trained_tokens:,} of {self.num_tokens:,} tokens with loss"
        text += f"; longest {self.longest_tokens:,} tokens for sequences of {seq_len:,}"
        if self.num_documents:
            text += f", {self.num_documents:,} texts and parts of long ones in them"
        if self.truncated_examples:
            text += f", {self.truncated_examples:,} cut off"
        if self.dropped_examples:
            text += f", {self.dropped_examples:,} left out (nothing to learn within the sequence)"
        used = self.file_tokens - self.lost_tokens
        text += f"; of {self.file_tokens:,} tokens in the file {used:,} used ({used / self.file_tokens:.0%})"
        text += f", {self.lost_tokens:,} lost; {self.padded_tokens:,} of padding"
        if self.repeated_tokens:
            text += f", {self.repeated_tokens:,} repeated as context"
        if self.template_losses:
            losses = ", ".join(f"{kind} in {count:,} lines" for kind, count in self.template_losses)
            text += f"; left out by the chat template, as allowed: {losses}"
        return text


@dataclass(frozen=True, slots=True)
class Dataset:
    """The usable examples of files, each at most ``seq_len`` long, and what was seen on the way."""

    examples: tuple[Example, ...]
    statistics: DataStatistics
    notes: tuple[str, ...] = ()
    """One line a file: what it is, and its first example; and what of a folder was left out."""
    samples: tuple[str, ...] = ()
    """The first examples as text, with what carries loss in brackets."""


# --- from records to a data set --------------------------------------------------------------------------------------


def load_dataset(
    paths: Path | Sequence[Path],
    tokenizer: Tokenizer,
    *,
    seq_len: int,
    options: DataOptions | None = None,
    show: int = 1,
) -> Dataset:
    """Read files into sequences of at most ``seq_len`` tokens.

    Args:
        paths: files, folders of them, or data sets that ``datasets`` saved.
        tokenizer: the model's tokenizer.
        seq_len: the plan's sequence length.
        options: how to read.
        show: how many samples to render.

    Raises:
        UsageError: no such file, an empty file, an unknown format, bad lines (the first ones are named, all are
            counted), no token to learn within ``seq_len``, or too much that does not fit.
        MachineError: a package that reads such files is missing.
    """
    options = options or DataOptions()
    if seq_len < 2:
        raise UsageError(f"the sequence length must be at least 2 tokens to predict one from another, not {seq_len}")
    if options.stride is not None and not 1 <= options.stride <= seq_len:
        raise UsageError(f"--stride {options.stride}: a window has {seq_len} tokens; give 1 to {seq_len}")
    given = [paths] if isinstance(paths, Path) else list(paths)
    found, notes = sources(given)
    made = _Making(tokenizer, seq_len, options, TemplateFit(tokenizer, options.allow_loss))
    readings = [_read(open_source(each), made) for each in found]
    bad = [line for reading in readings for line in reading.bad]
    if bad:
        raise bad_lines_error(bad, num_lines=sum(reading.num_rows for reading in readings))
    name = ", ".join(map(str, given))
    dataset = made.dataset(readings, name=name)
    samples = tuple(shown(example, tokenizer) for example in made.whole[:show])
    described = [reading.description() for reading in readings]
    return Dataset(dataset.examples, dataset.statistics, (*described, *notes), samples)


def _read(reading: Reading, made: _Making) -> Reading:
    for where, record in reading.records():
        try:
            made.add(record)
        except BadLineError as error:
            reading.refuse(where, error)
    return reading


@dataclass
class _Making:
    """Examples as they come, and what is cut from them."""

    tokenizer: Tokenizer
    seq_len: int
    options: DataOptions
    fit: TemplateFit
    whole: list[Example] = field(default_factory=list)
    """Before anything was cut."""
    pieces: list[tuple[Example, bool]] = field(default_factory=list)
    """Examples of at most ``seq_len`` tokens, and whether each may be packed."""
    documents: int = 0
    turns: int = 0
    """Examples that are no running text."""
    truncated: int = 0
    lost: int = 0
    repeated: int = 0

    def add(self, record: Record) -> None:
        """Tokenize a record, cut it to size and keep its examples."""
        for example in tokenize_record(record, self.tokenizer, raw=self.options.raw, fit=self.fit):
            self.whole.append(example)
            if isinstance(record, Text):
                self._add_text(example)
            else:
                self._add_turns(example, record)

    def _add_text(self, example: Example) -> None:
        made = windows(example, seq_len=self.seq_len, stride=self.options.stride or self.seq_len)
        self.repeated += sum(len(each.input_ids) for each in made) - len(example.input_ids)
        self.documents += len(made)
        self.pieces += [(each, self.options.packing != "none") for each in made]

    def _add_turns(self, example: Example, record: Record) -> None:
        self.turns += 1
        if len(example.input_ids) > self.seq_len:
            head = kept_head(example, record, self.tokenizer, raw=self.options.raw, fit=self.fit)
            shorter = cut(example, seq_len=self.seq_len, head=head)
            self.truncated += 1
            self.lost += len(example.input_ids) - len(shorter.input_ids)
            example = shorter
        self.pieces.append((example, self.options.packing == "all"))

    def dataset(self, readings: Sequence[Reading], *, name: str) -> Dataset:
        """Pack, drop what teaches nothing, and count; a :class:`UsageError` where that is all, or too much is cut."""
        num_lines = sum(reading.num_rows for reading in readings)
        teaching = [(example, packs) for example, packs in self.pieces if example.num_trained_tokens]
        dropped = len(self.pieces) - len(teaching)
        lost = self.lost + sum(len(each.input_ids) for each, _ in self.pieces if not each.num_trained_tokens)
        if not teaching:
            raise self._nothing(name, num_lines, sum(reading.left_out for reading in readings))
        self._refuse_much_cut(name)
        together = packed([each for each, packs in teaching if packs], seq_len=self.seq_len)
        kept = tuple([each for each, packs in teaching if not packs] + together)
        num_tokens = sum(len(each.input_ids) for each in kept)
        statistics = DataStatistics(
            num_lines=num_lines,
            num_examples=len(kept),
            longest_tokens=max(len(each.input_ids) for each in self.whole),
            sequence_tokens=_deciles(self._lengths(together)),
            truncated_examples=self.truncated,
            dropped_examples=dropped,
            num_tokens=num_tokens,
            num_trained_tokens=sum(each.num_trained_tokens for each in kept),
            file_tokens=sum(len(each.input_ids) for each in self.whole),
            lost_tokens=lost,
            repeated_tokens=self.repeated,
            padded_tokens=len(kept) * self.seq_len - num_tokens,
            num_documents=self.documents if together else 0,
            left_out=sum(reading.left_out for reading in readings),
            template_losses=tuple(sorted(self.fit.lost.items())),
        )
        return Dataset(kept, statistics)

    def _lengths(self, together: Sequence[Example]) -> list[int]:
        """Of packed sequences as they are; of what stands alone before it was cut."""
        if together:
            alone = [len(each.input_ids) for each, packs in self.pieces if not packs]
            return [*alone, *(len(each.input_ids) for each in together)]
        return [len(each.input_ids) for each in self.whole]

    def _nothing(self, name: str, num_lines: int, left_out: int) -> UsageError:
        if not self.whole:
            return UsageError(f"{name}: none of {num_lines:,} lines has an answer to learn ({left_out:,} left out)")
        needed = min(filter(None, map(_needed_tokens, self.whole)), default=None)
        hint = f"plan for sequences of at least {needed:,} tokens" if needed else "give lines of two tokens or more"
        return UsageError(
            f"{name}: nothing to learn within {self.seq_len:,} tokens in any of {num_lines:,} lines; {hint}"
        )

    def _refuse_much_cut(self, name: str) -> None:
        share = self.truncated / max(self.turns, 1)
        if share <= MOST_CUT or self.options.allow_cut:
            return
        longest = max(len(each.input_ids) for each in self.whole)
        raise UsageError(
            f"{name}: {self.truncated:,} of {self.turns:,} examples ({share:.0%}) are longer than the plan's "
            f"{self.seq_len:,} tokens and would lose {self.lost:,} of them; plan with --seq-len {longest}, or "
            f"--allow-cut to learn what is left (prompts lose their beginning, conversations their end)"
        )


def _deciles(lengths: Sequence[int]) -> tuple[int, ...]:
    """Eleven lengths, from the shortest to the longest."""
    ascending = sorted(lengths)
    return tuple(ascending[round(tenth * (len(ascending) - 1) / 10)] for tenth in range(11))


def _needed_tokens(example: Example) -> int:
    """Tokens up to and with the first one that carries loss; 0 when none does."""
    trained = (index + 1 for index, label in enumerate(example.labels) if index and label != IGNORE_INDEX)
    return next(trained, 0)


# --- shown to people -------------------------------------------------------------------------------------------------


def shown(example: Example, tokenizer: Any, *, most: int | None = None) -> str:
    """An example as text, ``[[`` and ``]]`` around what carries loss; at most so many characters of each part."""
    parts: list[str] = []
    for learned, ids in _runs(example):
        text = tokenizer.decode(list(ids))
        if most is not None and len(text) > most:
            text = f"{text[: most // 2]} ... {text[-(most // 2) :]}"
        parts.append(f"[[{text}]]" if learned else text)
    return "".join(parts)


def one_line(text: str, most: int = _SHOWN_CHARACTERS) -> str:
    """A text with its line breaks spelt out, and its middle left out where it is long."""
    flat = text.replace("\\", "\\\\").replace("\r", "\\r").replace("\n", "\\n")
    return flat if len(flat) <= most else f"{flat[: most // 2]} ... {flat[-most // 2 :]}"


def _runs(example: Example) -> Iterator[tuple[bool, tuple[int, ...]]]:
    start, labels = 0, example.labels
    for index in range(1, len(labels) + 1):
        here = index == len(labels) or (labels[index] != IGNORE_INDEX) != (labels[start] != IGNORE_INDEX)
        if here:
            yield labels[start] != IGNORE_INDEX, example.input_ids[start:index]
            start = index


Say = Callable[[str], None]


def describe(dataset: Dataset, say: Say, *, seq_len: int, show: int) -> None:
    """What was recognised with the first example, the count of tokens, and ``show`` examples in full."""
    first = f"; first example: {one_line(dataset.samples[0])}" if dataset.samples else ""
    for number, note in enumerate(dataset.notes):
        say(note + (first if number == 0 else ""))
    say(dataset.statistics.summary(seq_len))
    for number, sample in enumerate(dataset.samples[:show], 1):
        say(f"example {number}, [[what carries loss]]:\n{sample}")
