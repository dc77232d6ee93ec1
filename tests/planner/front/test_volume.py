"""The sweep over K, against arithmetic by hand, the plan's own traffic, and the paper's published point."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import meft
from meft.planner.traffic.transfer import step_transfer

TINY: dict[str, Any] = {"model": "smollm2-135m", "adapter_width": 16, "batch_size": 1, "seq_len": 4}


def test_the_papers_point() -> None:
    volume = meft.transfer_volume(model="llama-7b", adapter_width=6144, top_k=64)
    (point,) = volume.points
    assert point.active_rows == 1592
    assert volume.adapters_per_step[0] == pytest.approx(0.56, abs=0.005)  # Hao et al., section 3.3
    assert 2 / volume.adapters_per_step[0] == pytest.approx(3.57, abs=0.01)
    assert volume.adapter_bytes == 2 * 6144 * 4096 * 32 * 2  # 2RDL numbers in bf16


def test_bytes_by_hand() -> None:
    # L = 30, D = 576, T = 4; 3 rows active in every layer, bf16: 2 bytes a number.
    volume = meft.transfer_volume(**TINY, top_k=[2], active_rows=[3])
    (point,) = volume.points
    rows = 30 * 3 * 2 * 576 * 2
    assert point.h2d_bytes_per_step == 2 * 8 * 4 + rows
    assert point.d2h_bytes_per_step == 30 * 4 * 576 * 2 + rows + 4
    assert volume.basis == "measured"
    again = meft.transfer_volume(**TINY, top_k=[2], active_rows=[3], rows_in_backward="refetched").points[0]
    assert again.h2d_bytes_per_step - point.h2d_bytes_per_step == 29 * 3 * 2 * 576 * 2  # the last layer's are there
    fp32 = meft.transfer_volume(**TINY, top_k=[2], active_rows=[3], adapter_dtype="fp32").points[0]
    assert fp32.h2d_bytes_per_step == 2 * 8 * 4 + 2 * rows


def test_it_agrees_with_the_plans_own_traffic_of_the_same_choice() -> None:
    plan = meft.plan(gpu="rtx-3090", host_mem="64GB", adapter_width=6144, top_k=64)
    exact = {"routing": "exact", "num_experts": 1, "num_probes": 1, "prefetch_depth": 0, "rows_in_backward": "retained"}
    decision = plan.decision.model_copy(update=exact | {"cached_rows": 0, "gradients_on_device": False, "hot_rows": 0})
    transfer = step_transfer(request=plan.request, decision=decision, active_rows_per_layer=[1592] * 32)
    (point,) = meft.transfer_volume(adapter_width=6144, top_k=64).points
    assert point.h2d_bytes_per_step == transfer.h2d_bytes_per_step
    assert point.d2h_bytes_per_step == transfer.d2h_bytes_per_step


@settings(max_examples=20)
@given(width=st.integers(1, 9000), batch_size=st.integers(1, 8))
def test_more_rows_per_token_never_move_less(width: int, batch_size: int) -> None:
    volume = meft.transfer_volume(model="smollm2-135m", adapter_width=width, batch_size=batch_size, seq_len=128)
    assert volume.top_k[0] == 1
    assert list(volume.moved_bytes_per_step) == sorted(volume.moved_bytes_per_step)
    assert all(k <= active <= width for k, active in zip(volume.top_k, volume.active_rows, strict=True))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"top_k": []}, "top_k: the list is empty"),
        ({"top_k": [17]}, r"top_k 17: there are 16 rows \(adapter_width\)"),
        ({"top_k": [0]}, "top_k: .* greater than or equal to 1"),
        ({"top_k": [1, 2], "active_rows": [4]}, "active_rows: 1 numbers for 2 values of top_k"),
        ({"top_k": [4], "active_rows": [3]}, "active_rows: each is between its top_k and adapter_width 16"),
        ({"sparsity": "none"}, "unknown sparsity"),
        ({"seq_len": 1 << 14}, "seq_len 16384: smollm2-135m has 8192 positions"),
    ],
)
def test_what_is_wrong_is_named(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(meft.UsageError, match=says):
        meft.transfer_volume(**TINY | arguments)
