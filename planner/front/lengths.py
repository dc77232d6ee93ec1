"""``--lengths``: how long the sequences of a data set are, from a file or a distribution, and the batches they make.

Texts are measured with the ``tokenizers`` library, as ``meft-run`` makes examples of them: prompt and completion joined
as they stand (``--raw``), special tokens, the end of text. What goes through a chat template is refused: that is
``meft-run``'s to render.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from meft.planner.base.errors import UsageError
from meft.planner.base.packages import require_packages
from meft.planner.base.schema import parse_json, read_text
from meft.planner.front.asked import EstimateRequest
from meft.planner.front.options import MAX_SEQ_LEN
from meft.planner.front.request import Planning
from meft.planner.predict.estimates import Estimate
from meft.planner.predict.spread import reserved_spread
from meft.planner.records.setup import TrainingSetup
from meft.planner.terms.lengths import Batching, BatchShape, batch_shapes, distributed_lengths

if TYPE_CHECKING:
    from tokenizers import Tokenizer

DRAWN = 2000
"""Sequences of a distribution."""
ORDERS = 4
MICRO_BATCHES = 32
_WHAT = "one length a line, a JSON list of lengths, or JSON lines with input_ids or length"
_MAX_SEQUENCES = 10_000_000
_COUNTED = frozenset({"length", "input_ids"})


def lengths_of(text: str, *, most: int, tokenizer: str | None = None) -> tuple[int, ...]:
    """Tokens of each sequence, at most ``most``: drawn for ``mean,std``, else read from a file, whose texts are
    measured by the ``tokenizer`` in that folder.

    Raises :class:`UsageError` for a distribution or a file that is none.
    """
    parts = text.split(",")
    if len(parts) == 2:
        mean, std = (_number(part, text) for part in parts)
        if not 1 <= mean <= MAX_SEQ_LEN or not 0 <= std <= MAX_SEQ_LEN:
            raise UsageError(
                f"--lengths {text}: give a mean from 1 to {MAX_SEQ_LEN} tokens and a deviation of 0 or more"
            )
        return distributed_lengths(mean, std, most=most, count=DRAWN)
    return tuple(min(length, most) for length in _read(Path(text), tokenizer))


def orders_of(lengths: Sequence[int], *, batch_size: int, batching: Batching, most: int) -> list[list[BatchShape]]:
    """The first micro-batches of the data in several orders; the batch with the longest sequence, which every epoch
    has, is among them at a place of chance (first where data is sorted, as there)."""
    orders = []
    for seed in range(ORDERS):
        generator = np.random.default_rng(seed)
        shuffled = generator.permutation
        shapes = batch_shapes(lengths, batch_size=batch_size, batching=batching, most=most, shuffled=shuffled)
        order = list(islice(shapes, MICRO_BATCHES))
        longest = BatchShape(batch_size, max(lengths), padded=True)
        if batching == "padded" and max(shape.seq_len for shape in order) < longest.seq_len:
            order[int(generator.integers(MICRO_BATCHES))] = longest
        orders.append(order)
    return orders


def with_lengths(asked: EstimateRequest) -> tuple[EstimateRequest, tuple[int, ...]]:
    """The request for batches of the longest sequence, and the lengths; none where they do not vary."""
    if asked.lengths is None:
        if asked.batching is not None:
            raise UsageError(f"--batching {asked.batching}: of which sequences? Give --lengths too")
        if asked.tokenizer is not None:
            raise UsageError(f"--tokenizer {asked.tokenizer}: of which texts? Give --lengths FILE too")
        return asked, ()
    given = asked.seq_len if "seq_len" in asked.model_fields_set else MAX_SEQ_LEN
    lengths = lengths_of(asked.lengths, most=given, tokenizer=asked.tokenizer or _model_folder(asked.model))
    if asked.batching == "padding-free" and asked.attention != "flash":
        raise UsageError(
            "--batching padding-free: sequences are told apart by flash attention alone; give --attention flash"
        )
    longest = given if asked.batching == "packed" and given < MAX_SEQ_LEN else max(lengths)
    padded = asked.batching in (None, "padded", "sorted") and min(lengths) < longest
    return asked.model_copy(update={"seq_len": longest, "padding": asked.padding or padded}), lengths


def over_lengths(
    asked: EstimateRequest, estimate: Estimate, setup: TrainingSetup, lengths: tuple[int, ...], planned: Planning
) -> Estimate:
    """The estimate with what several orders of the data reserve, and the verdict on the worst of them."""
    if setup.model.measured is not None:
        raise UsageError(f"--lengths: {setup.model.name} has no closed form, which it takes; give --seq-len alone")
    batching = asked.batching or "padded"
    spread = reserved_spread(
        setup,
        orders_of(lengths, batch_size=setup.batch_size, batching=batching, most=setup.seq_len),
        batching=batching,
        lengths=lengths,
        gpu=planned.profiles.gpu,
        gpu_mem_bytes=planned.request.gpu_mem_bytes,
    )
    on_host = estimate.host_bytes <= estimate.host_budget_bytes
    verdict = spread.verdict if on_host else "does-not-fit"
    return estimate.model_copy(update={"lengths": spread, "verdict": verdict, "fits": verdict == "fits"})


def _number(part: str, text: str) -> float:
    try:
        number = float(part)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise UsageError(f"--lengths {text}: {part.strip()!r} is no number; give MEAN,STD such as 300,120, or a file")
    return number


def _model_folder(model: str | None) -> str | None:
    """Where the model is a folder, that has its tokenizer."""
    return model if model is not None and (Path(model) / "tokenizer.json").is_file() else None


def _read(path: Path, tokenizer: str | None) -> list[int]:
    text = read_text(path, kind="--lengths file").strip()
    try:
        values = json.loads(text) if text.startswith("[") else [json.loads(line) for line in text.splitlines() if line]
    except ValueError as error:
        if tokenizer is None or text.startswith(("{", "[")):
            raise UsageError(f"--lengths {path}: {error}; give {_WHAT}") from None
        values = [{"text": line} for line in text.splitlines() if line.strip()]
    if not values or len(values) > _MAX_SEQUENCES:
        raise UsageError(f"--lengths {path}: {len(values)} sequences; give 1 to {_MAX_SEQUENCES}, as {_WHAT}")
    places = [f"--lengths {path}: sequence {number}" for number in range(1, len(values) + 1)]
    if any(isinstance(value, dict) and not _COUNTED & value.keys() for value in values):
        values = _measured([_text(value, place) for value, place in zip(values, places, strict=True)], path, tokenizer)
    return [_length(value, place) for value, place in zip(values, places, strict=True)]


def _text(value: Any, place: str) -> str:
    """A line's text, or its prompt and completion as they stand."""
    fields = value if isinstance(value, dict) else {}
    given = [fields.get("text")] if "text" in fields else [fields.get("prompt"), fields.get("completion")]
    parts = [part for part in given if isinstance(part, str)]
    if len(parts) < len(given) or fields.get("system"):
        raise UsageError(
            f"{place}: no text, nor prompt and completion; conversations need the chat template, which meft-run "
            f"renders: give JSON lines with their input_ids"
        )
    return "".join(parts)


def _measured(texts: list[str], path: Path, tokenizer: str | None) -> list[int]:
    """Tokens of each text, special ones and the end of text with them."""
    if tokenizer is None:
        raise UsageError(f"--lengths {path}: it holds texts; give --tokenizer DIR, the folder with tokenizer.json")
    file = Path(tokenizer) / "tokenizer.json"
    if not file.is_file():
        raise UsageError(f"--tokenizer {tokenizer}: no tokenizer.json in it; give the folder that the model came in")
    require_packages("tokenizers", purpose="--lengths of texts")
    from tokenizers import Tokenizer

    own = Tokenizer.from_file(str(file))
    own.no_padding()
    own.no_truncation()
    end = _end_of_text(file.parent, own)
    found = (encoding.ids for encoding in own.encode_batch(texts))
    return [len(ids) + (end is not None and ids[-1:] != [end]) for ids in found]


def _end_of_text(folder: Path, own: Tokenizer) -> int | None:
    """The token that follows every text, by the folder's ``tokenizer_config.json``."""
    file = folder / "tokenizer_config.json"
    if not file.is_file():
        return None
    token = parse_json(read_text(file, kind="tokenizer_config.json"), source=str(file)).get("eos_token")
    if isinstance(token, dict):
        token = token.get("content")
    found: int | None = own.token_to_id(token) if isinstance(token, str) else None
    return found


def _length(value: Any, place: str) -> int:
    if isinstance(value, dict):
        value = value.get("length", value.get("input_ids"))
    if isinstance(value, list):
        value = len(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_SEQ_LEN:
        raise UsageError(f"{place}: no length from 1 to {MAX_SEQ_LEN}; give {_WHAT}")
    return value
