"""Examples of any length become sequences of one: long texts cut into windows, short ones packed, prompts cut.

A text of ``n`` tokens gives windows of ``S`` that begin every ``stride`` tokens; what a window shares with the one
before is context, so that each token carries loss once. What is left over goes with other short texts into one
sequence by best fit, longest first: each goes where it leaves least room. Packed documents keep their own positions and
attend to nothing but themselves where the model's attention can be told so (:meth:`Session.loss`); a document's first
token has no label, as nothing before it predicts it.

A prompt that is too long loses its beginning, behind what the tokenizer or the template begins with.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence

from meft.runtime.data.examples import IGNORE_INDEX, Example


def windows(example: Example, *, seq_len: int, stride: int) -> list[Example]:
    """The windows of a text; itself where it is short enough."""
    length = len(example.input_ids)
    found, seen, start = [], 0, 0
    while seen < length:
        if seen == start == length - 1 and seen:  # a token alone learns nothing: the one before it goes with it
            start -= 1
        stop = min(start + seq_len, length)
        hidden = max(seen - start, 0)
        labels = (IGNORE_INDEX,) * hidden + example.labels[start + hidden : stop]
        found.append(Example(example.input_ids[start:stop], labels))
        seen, start = stop, start + stride
    return found


def packed(examples: Sequence[Example], *, seq_len: int) -> list[Example]:
    """Sequences of at most ``seq_len`` tokens that hold all examples, each whole; in the order of their first ones."""
    order = sorted(range(len(examples)), key=lambda index: (-len(examples[index].input_ids), index))
    rooms: list[tuple[int, int]] = []  # free tokens and bin, ascending
    bins: list[list[int]] = []
    for index in order:
        length = len(examples[index].input_ids)
        place = bisect.bisect_left(rooms, (length, -1))
        if place == len(rooms):
            bins.append([])
            room, bin_ = seq_len, len(bins) - 1
        else:
            room, bin_ = rooms.pop(place)
        bins[bin_].append(index)
        if room > length:
            bisect.insort(rooms, (room - length, bin_))
    return [joined([examples[index] for index in sorted(each)]) for each in sorted(map(sorted, bins))]


def joined(examples: Sequence[Example]) -> Example:
    """Documents one after the other in one sequence; one alone stays as it is."""
    if len(examples) == 1:
        return examples[0]
    ids: list[int] = []
    labels: list[int] = []
    starts: list[int] = []
    for example in examples:
        starts += [len(ids) + start for start in example.starts]
        labels += [IGNORE_INDEX, *example.labels[1:]]
        ids += example.input_ids
    return Example(tuple(ids), tuple(labels), tuple(starts))


def cut(example: Example, *, seq_len: int, head: int) -> Example:
    """At most ``seq_len`` tokens: of one span with loss, the prompt's beginning after ``head`` tokens goes first; of
    several, and of a completion that is too long by itself, the end.
    """
    excess = len(example.input_ids) - seq_len
    if excess <= 0:
        return example
    first = next((index for index, label in enumerate(example.labels) if label != IGNORE_INDEX), 0)
    one_span = all(label != IGNORE_INDEX for label in example.labels[first : _end(example)])
    if one_span:
        head = min(head, seq_len // 2)
        gone = max(0, min(excess, first - max(head, 1)))
        at = first - gone if head > first - gone else head
        ids = example.input_ids[:at] + example.input_ids[at + gone :]
        labels = example.labels[:at] + example.labels[at + gone :]
        return Example(ids, labels).truncated(seq_len)
    return example.truncated(seq_len)


def _end(example: Example) -> int:
    """One past the last token with loss."""
    length = len(example.labels)
    return next((length - back for back, label in enumerate(reversed(example.labels)) if label != IGNORE_INDEX), 0)
