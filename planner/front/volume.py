"""Bytes over the link against K: what the choice of rows per token does to a step's traffic.

Letters: ``T`` tokens, ``L`` layers, ``D`` hidden size, ``R`` adapter rows per layer, ``K`` rows per token, ``A`` active
rows; ``M = 2*R*D*L`` are the adapter's parameters.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from meft.planner.base.dtypes import AdapterDtype
from meft.planner.base.errors import UsageError
from meft.planner.base.quantities import ADAPTER_DTYPE_BYTES
from meft.planner.base.schema import Basis, Bytes, Count, Record
from meft.planner.base.units import GIB
from meft.planner.front.arguments import Reference, as_arguments, request_options
from meft.planner.front.options import USUAL_BATCH_SIZE, RequestOptions
from meft.planner.front.request import planning
from meft.planner.predict.comparison import USUAL_SIZES
from meft.planner.records.candidates import Candidates
from meft.planner.records.plan import Request, RowsInBackward
from meft.planner.records.profile_catalogue import load_defaults
from meft.planner.records.profiles import SparsityProfile
from meft.planner.traffic.sparsity import active_rows_per_layer, at_seq_len
from meft.planner.traffic.transfer import StepRows, step_bytes, step_bytes_by_category, whole_adapter_bytes


class VolumePoint(Record):
    """One K: rows that a micro-batch activates, the mean over the layers, and bytes of a step in both directions."""

    top_k: Count
    active_rows: float
    h2d_bytes_per_step: Bytes
    d2h_bytes_per_step: Bytes

    @property
    def moved_bytes_per_step(self) -> int:
        """Both directions."""
        return self.h2d_bytes_per_step + self.d2h_bytes_per_step


class TransferVolume(Record):
    """Traffic of a step by K, for exact routing and nothing kept on the device from step to step."""

    model: str
    sparsity: str
    basis: Basis
    """Of the active rows; given them, the bytes are counted."""
    adapter_width: Count
    adapter_dtype: AdapterDtype
    tokens_per_step: Count
    adapter_bytes: Bytes
    """``M`` in bytes: moving the whole adapter in and its gradients out takes twice as many."""
    points: tuple[VolumePoint, ...]

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        from meft.planner.base.html import html_table
        from meft.planner.base.units import format_bytes

        return html_table(
            f"{self.model}, adapter width {self.adapter_width:,}: traffic of a step of {self.tokens_per_step:,} tokens",
            ("K", "active rows", "to device", "to host", "both, in adapters"),
            [
                (
                    f"{point.top_k:,}",
                    f"{point.active_rows:,.0f}",
                    format_bytes(point.h2d_bytes_per_step),
                    format_bytes(point.d2h_bytes_per_step),
                    f"{adapters:.3f}",
                )
                for point, adapters in zip(self.points, self.adapters_per_step, strict=True)
            ],
            notes=(f"active rows: {self.basis} ({self.sparsity}); moving the whole adapter both ways is 2 adapters",),
        )

    @property
    def top_k(self) -> tuple[int, ...]:
        """K of each point."""
        return tuple(point.top_k for point in self.points)

    @property
    def active_rows(self) -> tuple[float, ...]:
        """Active rows of each point, the mean over the layers."""
        return tuple(point.active_rows for point in self.points)

    @property
    def moved_bytes_per_step(self) -> tuple[int, ...]:
        """Bytes of each point, both directions."""
        return tuple(point.moved_bytes_per_step for point in self.points)

    @property
    def adapters_per_step(self) -> tuple[float, ...]:
        """The same in units of ``M``; 2 is moving the whole adapter in and its gradients out."""
        return tuple(moved / self.adapter_bytes for moved in self.moved_bytes_per_step)


def transfer_volume(
    *,
    model: Reference = "llama-7b",
    adapter_width: int | None = None,
    top_k: int | Iterable[int] | None = None,
    batch_size: int = USUAL_BATCH_SIZE,
    seq_len: int = RequestOptions.seq_len,
    sparsity: Reference | None = None,
    adapter_dtype: AdapterDtype | None = None,
    rows_in_backward: RowsInBackward = "retained",
    active_rows: Sequence[int] | None = None,
) -> TransferVolume:
    """Bytes over the link per step (one micro-batch, forward and backward) for each K.

    Rows are chosen exactly, none is fetched ahead or kept on the device. ``adapter_width`` is 6144 unless given;
    ``top_k`` are powers of two up to it. ``active_rows`` says of each K how many rows a micro-batch activates in every
    layer, where that is known; else the sparsity profile does.

    Raises :class:`UsageError` for a value that cannot be used.
    """
    with as_arguments():
        width = adapter_width if adapter_width is not None else USUAL_SIZES["meft"].size
        options = request_options(
            {
                "model": model,
                "gpu": load_defaults().gpu,
                "host_mem": 64 * GIB,
                "adapter_width": width,
                "batch_size": batch_size,
                "seq_len": seq_len,
                "sparsity": sparsity,
                "adapter_dtype": adapter_dtype,
                "rows_in_backward": rows_in_backward,
            }
        )
        planned = planning(options)
        request, profile = planned.request, planned.profiles.sparsity
        assert request.adapter_width is not None
        chosen = _top_ks(top_k, request.adapter_width)
        per_layer = _rows(request, profile, chosen, active_rows)
    return _volume(request, profile, chosen, per_layer, basis=profile.basis if active_rows is None else "measured")


def _top_ks(given: int | Iterable[int] | None, width: int) -> NDArray[np.int64]:
    """The values of K, each checked."""
    if given is None:
        return np.array([1 << power for power in range(width.bit_length())])
    values = list(given) if isinstance(given, Iterable) else [given]
    if not values:
        raise UsageError("top_k: the list is empty; give at least one number of rows per token")
    for value in values:
        top_k = request_options({"top_k": value}).top_k
        if top_k is None or top_k > width:
            raise UsageError(f"top_k {value}: there are {width} rows (adapter_width); give at most that")
    return np.array(values, dtype=np.int64)


def _rows(
    request: Request, profile: SparsityProfile, top_k: NDArray[np.int64], given: Sequence[int] | None
) -> NDArray[np.int64]:
    """Active rows ``[L, points]``."""
    num_layers, width = request.model.num_layers, request.adapter_width or 0
    if given is None:
        return active_rows_per_layer(
            at_seq_len(profile, request.seq_len),
            num_layers,
            tokens=request.tokens_per_step,
            top_k=top_k,
            adapter_width=width,
        )
    rows = np.array(given, dtype=np.int64)
    if rows.shape != top_k.shape:
        raise UsageError(f"active_rows: {rows.size} numbers for {top_k.size} values of top_k; give one for each")
    if ((rows < top_k) | (rows > width)).any():
        raise UsageError(f"active_rows: each is between its top_k and adapter_width {width}, found {rows.tolist()}")
    return np.broadcast_to(rows, (num_layers, *rows.shape))


def _volume(
    request: Request, profile: SparsityProfile, top_k: NDArray[np.int64], rows: NDArray[np.int64], *, basis: Basis
) -> TransferVolume:
    width = request.adapter_width or 0
    candidates = Candidates(
        adapter_width=width,
        top_k=top_k,
        prefetch_depth=0,
        active_rows_cap=width,
        num_experts=1,
        num_probes=1,
        key_experts=False,
        retained=request.rows_in_backward != "refetched",
        activation_checkpointing=False,
    )
    categories = step_bytes_by_category(request=request, candidates=candidates, rows=StepRows(active=rows))
    h2d, d2h = (np.broadcast_to(side, top_k.shape).tolist() for side in step_bytes(categories))
    whole = whole_adapter_bytes(
        num_layers=request.model.num_layers,
        adapter_width=width,
        hidden_size=request.model.hidden_size,
        adapter_dtype_bytes=ADAPTER_DTYPE_BYTES[request.adapter_dtype],
    )
    columns = zip(top_k.tolist(), rows.mean(axis=0).tolist(), h2d, d2h, strict=True)
    return TransferVolume(
        model=request.model.name,
        sparsity=profile.key,
        basis=basis,
        adapter_width=width,
        adapter_dtype=request.adapter_dtype,
        tokens_per_step=request.tokens_per_step,
        adapter_bytes=int(whole) // 2,
        points=tuple(
            VolumePoint(top_k=k, active_rows=active, h2d_bytes_per_step=to_device, d2h_bytes_per_step=to_host)
            for k, active, to_device, to_host in columns
        ),
    )
