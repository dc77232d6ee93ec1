"""From a model and text to a sparsity profile: measure, judge each half of the text by the other, fit both, describe.

Unions are counted over tokens alone: how many positions of a micro-batch are padding depends on ``seq_len``, and
``calibrate`` counts it in runs. The sequences of each source are dealt to two halves of as many tokens. The law is
fitted to unions at a few ``T``, ``K`` and ``R``; its stated error is that of all other points of a half's text by the
law of the other half, the worse of both ways. The profile's law is fitted to both halves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from meft.planner.base.errors import UsageError
from meft.planner.records.profile_file import Measurement, ProfileFile
from meft.planner.records.profiles import Popularity, SparsityProfile
from meft.planner.traffic.union_fit import FitError, UnionPoints, fit_error, fit_layers
from meft.runtime.adapter.blocks import ffn_modules
from meft.runtime.data.embedded import SMOLLM2_PROFILE, airport_questions, factbook_texts, smollm2_folder
from meft.runtime.data.examples import tokenize_record
from meft.runtime.data.formats import read_entry, recognise
from meft.runtime.data.loading import DataOptions, load_dataset
from meft.runtime.profiling import sparsity_probe as probe
from meft.runtime.profiling.hardware import describe_machine
from meft.runtime.profiling.measure import measurement
from meft.runtime.session.checkpoint import weights_path
from meft.runtime.session.model_folder import load_causal_lm
from meft.runtime.session.model_loading import load_tokenizer
from meft.runtime.session.tensor_files import load_tensors

FITTED_TOKENS, FITTED_TOP_KS, FITTED_WIDTHS = (64, 256, 1024, 2048), (8, 32, 128), (256, 1024, 4096)
"""The fit sees these, each with each; every other point judges it."""
TYPICAL = (512, 64, 2048)
"""``T``, ``K``, ``R`` of spread, recall and popularity, or the nearest measured."""
SPREAD_QUANTILE = 0.99
MOST_LINES = 4000
"""Of an embedded source: more are not needed."""
EMBEDDED: dict[str, Callable[[], list[dict[str, str]]]] = {"airports": airport_questions, "factbook": factbook_texts}
Unions = dict[tuple[int, int, int], list[list[float]]]
"""Sizes by ``(T, K, R)``: per layer, per window."""
Tell = Callable[[str, int, int], None]
TokenIds = tuple[int, ...]
"""Token ids."""


@dataclass(frozen=True)
class SparsityRequest:
    """What to measure."""

    model: str
    data: tuple[str, ...]
    """JSONL files (text files with ``as_text``) or names of :data:`EMBEDDED`."""
    as_text: bool = False
    raw: bool = False
    seq_len: int = 256
    tokens: int = 8192
    """Of each half."""
    adapter: Path | None = None
    seed: int = 0


@dataclass
class Half:
    """What one half of the text showed."""

    unions: Unions = field(default_factory=dict)
    recalls: list[list[float]] = field(default_factory=list)
    """Per group, by depth."""
    experts: dict[int, list[float]] = field(default_factory=dict)
    """By probes, per group and layer."""
    fetches: NDArray[np.int64] | None = None
    """``[L, R]``: windows of the typical ``T`` whose union held the row."""


def measure_sparsity(request: SparsityRequest, tell: Tell, *, meft_version: str) -> tuple[ProfileFile, FitError]:
    """The profile with the measurements behind it, and the fit's error on what it did not see.

    Raises :class:`UsageError` for a model, adapter or data that cannot be used, and for too little text.
    """
    folder = smollm2_folder() if request.model in ("smollm2", SMOLLM2_PROFILE) else Path(request.model)
    sequences = _sequences(request, folder)
    model = _load(folder)
    pools, routers = _pools(request, model)
    grid = probe.Grid().up_to(min(map(len, pools)))
    halves = []
    for number, half in enumerate(sequences):
        halves.append(_measure_half(model, half, pools, routers, grid, request, tell, done=number))
    fitted = _points(_together([half.unions for half in halves]), seen=True)
    error = _judged(halves)
    machine = describe_machine()
    profile = SparsityProfile(
        key=f"{folder.name.lower()}-{'-'.join(Path(name).stem for name in request.data)}",
        name=f"{folder.name} on {', '.join(Path(name).name for name in request.data)}",
        basis="measured",
        source=_source(request, error, machine.date, torch.__version__),
        layers=fit_layers(fitted),
        spread_fraction=_spread(halves),
        popularity=_popularity(halves),
        least_share=float(fitted.shares.min()),
        greatest_share=float(fitted.shares.max()),
        prefetch_recall_by_depth=(1.0, *(round(float(r), 4) for r in np.mean(_all_recalls(halves), axis=0))),
    )
    file = ProfileFile(
        meft_version=meft_version,
        machine=machine,
        measurements=tuple(_measurements(halves, error)),
        warnings=(),
        sparsity=profile,
    )
    return file, error


def _source(request: SparsityRequest, error: FitError, date: str, torch_version: str) -> str:
    rows = "the rows of a trained adapter" if request.adapter else "the model's own FFN rows as keys, exact routing"
    data = " ".join(f"--data {Path(name).name}" for name in request.data)
    return (
        f"meft-profile sparsity --model {Path(request.model).name} {data}: {rows}; fitted to {2 * request.tokens:,} "
        f"tokens in sequences of up to {request.seq_len}; fitted to one half of them, on the other half and at "
        f"{error.points} points (T, K, R) that the fit did not see, the rows of a layer are {error.mean:.1%} off (mean "
        f"over layers and points), and the mean of all layers' rows {error.worst_total:.1%} at the worst point; "
        f"spread_fraction: {SPREAD_QUANTILE:.0%} of batches of {TYPICAL[0]} tokens lie within it; "
        f"{date}, torch {torch_version}"
    )


# --- model, rows, text ---------------------------------------------------------------------------------------------


def _load(folder: Path) -> torch.nn.Module:
    from transformers.utils import logging

    if not folder.is_dir():
        raise UsageError(f"--model {folder}: no such folder; give one with config.json and weights, or smollm2")
    logging.disable_progress_bar()
    return load_causal_lm(folder, dtype=torch.float32).eval()


def _pools(request: SparsityRequest, model: torch.nn.Module) -> tuple[list[torch.Tensor], list[torch.Tensor] | None]:
    """Rows per layer, and the routers of a trained adapter with Key-Experts."""
    if request.adapter is None:
        return probe.model_rows(model, seed=request.seed), None
    tensors = load_tensors(weights_path(request.adapter))
    blocks = len(ffn_modules(model))
    names = [f"layers.{layer}.rows" for layer in range(blocks)]
    if any(name not in tensors for name in names) or f"layers.{blocks}.rows" in tensors:
        raise UsageError(f"--adapter {request.adapter}: it does not have {blocks} layers, as the model has")
    keys = [tensors[name].float().tensor_split(2, dim=1)[0].contiguous() for name in names]
    routers = [tensors.get(f"layers.{layer}.router") for layer in range(blocks)]
    return keys, None if None in routers else [each.float() for each in routers if each is not None]


def _sequences(request: SparsityRequest, folder: Path) -> tuple[list[TokenIds], list[TokenIds]]:
    """Token ids for each half, from sources of which each has as many tokens."""
    tokenizer = load_tokenizer(folder)
    sources = [_source_sequences(name, request, tokenizer) for name in request.data]
    needed = 2 * (request.tokens + request.seq_len * 2)
    halves, short = dealt(sources, needed=needed)
    if short is not None:
        found = sum(map(len, chain(*halves)))
        raise UsageError(
            f"--data {request.data[short]}: {found:,} tokens were found and {needed:,} are needed to measure "
            f"{request.tokens:,} and judge on as many; give more text, or a smaller --tokens"
        )
    return halves


def dealt(
    sources: Sequence[Sequence[TokenIds]], *, needed: int
) -> tuple[tuple[list[TokenIds], list[TokenIds]], int | None]:
    """Two halves of ``needed`` tokens in all: as many of each source, and of each as many in one half as in the other,
    so that the halves are of one kind whatever the sequences' lengths; and the source that has too few, if one has.
    """
    halves: tuple[list[TokenIds], list[TokenIds]] = ([], [])
    first_is_ahead = [0] * len(sources)
    taken, places = [0] * len(sources), [0] * len(sources)
    while sum(taken) < needed:
        least = min(range(len(sources)), key=lambda source: taken[source])
        if places[least] == len(sources[least]):
            return halves, least
        sequence = sources[least][places[least]]
        places[least] += 1
        taken[least] += len(sequence)
        into_first = first_is_ahead[least] <= 0
        first_is_ahead[least] += len(sequence) if into_first else -len(sequence)
        halves[0 if into_first else 1].append(sequence)
    return halves, None


def _source_sequences(name: str, request: SparsityRequest, tokenizer: Any) -> list[TokenIds]:
    limit = request.seq_len
    if name in EMBEDDED:
        lines = EMBEDDED[name]()[:MOST_LINES]
        records = [read_entry(recognise(line), line, where=name) for line in lines]
        made = [tokenize_record(record, tokenizer, raw=request.raw) for record in records if record is not None]
        examples = list(chain(*made))
        return [example.input_ids[:limit] for example in examples]
    if request.as_text:
        from meft.planner.base.schema import read_text

        ids = tokenizer.encode(read_text(name, kind="text file"), add_special_tokens=False)
        return [tuple(ids[start : start + limit]) for start in range(0, len(ids), limit)]
    options = DataOptions(raw=request.raw, packing="none", allow_cut=True)
    dataset = load_dataset(Path(name), tokenizer, seq_len=limit, options=options, show=0)
    return [example.input_ids for example in dataset.examples]


# --- measuring -----------------------------------------------------------------------------------------------------


def _measure_half(
    model: torch.nn.Module,
    sequences: Sequence[TokenIds],
    pools: list[torch.Tensor],
    routers: list[torch.Tensor] | None,
    grid: probe.Grid,
    request: SparsityRequest,
    tell: Tell,
    *,
    done: int,
) -> Half:
    groups = request.tokens // probe.GROUP_TOKENS
    half = Half()
    width = _nearest(TYPICAL[2], grid.widths)
    keys = [pool[:width] for pool in pools]
    experts = routers or None
    for number, hidden in enumerate(probe.hidden_groups(model, sequences)):
        if number == groups:
            break
        tell("text that is fitted" if done == 0 else "held-out text", done * groups + number, 2 * groups)
        for layer, (pool, states) in enumerate(zip(pools, hidden, strict=True)):
            _add_unions(half, layer, probe.count_unions(pool, states, grid))
        _add_recalls_and_fetches(half, keys, hidden, grid)
        if number == 0:
            _add_experts(half, keys, hidden, experts, grid)
    return half


def _add_unions(half: Half, layer: int, found: dict[tuple[int, int, int], list[float]]) -> None:
    for point, sizes in found.items():
        layers = half.unions.setdefault(point, [])
        if len(layers) == layer:
            layers.append([])
        layers[layer].extend(sizes)


def _typical(grid: probe.Grid, keys: Sequence[torch.Tensor]) -> tuple[int, int]:
    """Tokens and K."""
    below = tuple(k for k in grid.top_ks if k < keys[0].shape[0])
    return _nearest(TYPICAL[0], grid.tokens), _nearest(TYPICAL[1], below)


def _add_recalls_and_fetches(
    half: Half, keys: list[torch.Tensor], hidden: list[torch.Tensor], grid: probe.Grid
) -> None:
    tokens, top_k = _typical(grid, keys)
    pairs = zip(keys, hidden, strict=True)
    exact = [probe.window_unions(rows, states, tokens=tokens, top_k=top_k) for rows, states in pairs]
    depths = range(1, min(probe.DEPTHS, len(keys) - 1) + 1)
    half.recalls.append(
        [probe.look_ahead_recall(keys, hidden, exact, depth=depth, tokens=tokens, top_k=top_k) for depth in depths]
    )
    fetches = np.stack([unions.sum(0).numpy() for unions in exact])
    half.fetches = fetches if half.fetches is None else half.fetches + fetches


def _add_experts(
    half: Half,
    keys: list[torch.Tensor],
    hidden: list[torch.Tensor],
    routers: list[torch.Tensor] | None,
    grid: probe.Grid,
) -> None:
    """A trained adapter's routers as they are; for fresh rows those grouped by likeness, scored by their means."""
    tokens, top_k = _typical(grid, keys)
    for layer, (rows, states) in enumerate(zip(keys, hidden, strict=True)):
        if routers is not None:
            grouped, router = rows, routers[layer]
            if rows.shape[0] % router.shape[0]:
                continue
        else:
            num_experts = min(probe.NUM_EXPERTS, rows.shape[0] // 8)
            grouped = probe.clustered(rows[: rows.shape[0] // num_experts * num_experts], num_experts)
            router = grouped.view(num_experts, -1, grouped.shape[1]).mean(1)
        for probes in probe.PROBES:
            if probes < router.shape[0]:
                found = probe.expert_recall(grouped, states[:tokens], router, num_probes=probes, top_k=top_k)
                half.experts.setdefault(probes, []).append(found)


# --- what it comes to ----------------------------------------------------------------------------------------------


def _points(unions: Unions, *, seen: bool) -> UnionPoints:
    """Mean fractions: the points that the fit sees, or all others."""
    widths = {width for _, _, width in unions}
    fitted_widths = {_nearest(width, tuple(widths)) for width in FITTED_WIDTHS}
    chosen = [
        point
        for point in sorted(unions)
        if (point[0] in FITTED_TOKENS and point[1] in FITTED_TOP_KS and point[2] in fitted_widths) == seen
    ]
    fractions = [[float(np.mean(sizes)) / point[2] for sizes in unions[point]] for point in chosen]
    return UnionPoints(
        tokens=np.array([float(tokens) for tokens, _, _ in chosen]),
        shares=np.array([top_k / width for _, top_k, width in chosen]),
        fractions=np.array(fractions).T,
    )


def _together(unions: Sequence[Unions]) -> Unions:
    """The windows of all halves as those of one text."""
    return {
        point: [list(chain(*layers)) for layers in zip(*(each[point] for each in unions), strict=True)]
        for point in unions[0]
    }


def _judged(halves: Sequence[Half]) -> FitError:
    """The error of the law of one half at the other half's points that the fit did not see: the worse of both ways."""
    one, other = (half.unions for half in halves)
    errors = [
        fit_error(fit_layers(_points(known, seen=True)), _points(unknown, seen=False))
        for known, unknown in ((one, other), (other, one))
    ]
    return max(errors, key=lambda error: error.worst_total)


def _typical_sizes(half: Half) -> NDArray[np.float64]:
    """Unions ``[L, windows]`` at the typical point, or the nearest that was measured."""
    point = min(half.unions, key=lambda p: sum(abs(np.log(a / b)) for a, b in zip(p, TYPICAL, strict=True)))
    return np.array(half.unions[point])


def _spread(halves: Sequence[Half]) -> float:
    """How far above its layer's mean a batch lies, at the 99th percentile over layers and batches."""
    sizes = np.concatenate([_typical_sizes(half) for half in halves], axis=1)
    above = sizes / sizes.mean(axis=1, keepdims=True) - 1
    return round(float(np.clip(np.quantile(above, SPREAD_QUANTILE), 0.0, 1.0)), 4)


def _popularity(halves: Sequence[Half]) -> tuple[Popularity, ...]:
    """What the rows that are hottest in one half carry in the other, mean over layers."""
    known, judged = (half.fetches for half in halves)
    assert known is not None
    assert judged is not None
    by_layer = [probe.popularity(fetches, ranked_by=rank) for fetches, rank in zip(judged, known, strict=True)]
    points, least = [], 0.0
    for hot in probe.HOT_SHARES:
        least = max(hot, least, float(np.mean([shares[hot] for shares in by_layer])))
        points.append(Popularity(rows=hot, traffic=round(min(least, 1.0), 4)))
    return tuple(points)


def _all_recalls(halves: Sequence[Half]) -> NDArray[np.float64]:
    return np.array([recalls for half in halves for recalls in half.recalls])


def _measurements(halves: Sequence[Half], error: FitError) -> Iterator[Measurement]:
    """Unions over layers at every point of the second half, recalls, popularity, and the fit's error."""
    for (tokens, top_k, width), layers in sorted(halves[1].unions.items()):
        means = [float(np.mean(sizes)) for sizes in layers]
        detail = f"T={tokens}, K={top_k}, R={width}, spread over layers"
        yield measurement("active rows, held-out text", "rows", detail, means)
    for depth, values in enumerate(_all_recalls(halves).T, start=1):
        yield measurement(f"look-ahead recall, depth {depth}", "share", "of the exact union", values.tolist())
    for probes, values in halves[0].experts.items():
        detail = "of each token's exact choice, spread over layers"
        yield measurement(f"Key-Experts recall, {probes} probes", "share", detail, values)
    assert halves[0].fetches is not None
    by_layer = [probe.popularity(fetches) for fetches in halves[0].fetches]
    for hot in probe.HOT_SHARES:
        values = [shares[hot] for shares in by_layer]
        yield measurement(f"traffic of the hottest {hot:.0%} of rows", "share", "spread over layers", values)
    yield measurement("error of active rows, mean", "share", f"{error.points} unseen points", [error.mean])
    yield measurement("error of active rows, worst point", "share", "mean over layers", [error.worst_point])
    detail = "of the mean of all layers' rows, which traffic follows"
    yield measurement("error of total rows, worst point", "share", detail, [error.worst_total])


def _nearest(wanted: int, measured: Sequence[int]) -> int:
    return min(measured, key=lambda each: abs(np.log(each / wanted)))
