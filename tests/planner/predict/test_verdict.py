"""Whether a run runs: the allocator's retries, and the range of the CUDA context."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from meft.planner.cli.estimate import estimate_command
from meft.planner.predict.verdict import judged
from meft.planner.records.profile_catalogue import load_gpu
from meft.planner.simulation.stream import Stream, StreamEvent, stream_peaks

MIB = 1 << 20
GPU = load_gpu("rtx-3090")
LOW, HIGH = GPU.context.low_bytes, GPU.context.high_bytes


def event(tensor: int, mebibytes: int) -> StreamEvent:
    return StreamEvent(tensor, mebibytes * MIB, "forward", "x")


FRAGMENTED = Stream((event(1, 12), event(2, 12), event(1, -12), event(3, 14)))
"""Segments of 12, 12 and 14 MiB: the first, free by then, is too small for the last. At most 26 MiB are allocated, 38
reserved; with less the first is given back to the device, and 26 do."""


@pytest.mark.parametrize(
    ("room", "context", "verdict", "flushes"),
    [
        (38, HIGH, "fits", 0),
        (37, HIGH, "fits-after-retries", 1),
        (26, HIGH, "fits-after-retries", 1),
        (25, HIGH, "uncertain", 0),
        (38, LOW, "uncertain", 0),
        (26, LOW, "uncertain", 1),
        (25, LOW, "does-not-fit", 0),
    ],
)
def test_a_run_is_judged_by_whether_it_runs(room: int, context: int, verdict: str, flushes: int) -> None:
    """``room`` MiB beside the largest context, or beside the smallest; the two are further apart than that."""
    assert HIGH - LOW > 38 * MIB
    peaks = stream_peaks(FRAGMENTED)
    assert (peaks.allocated_bytes, peaks.reserved_bytes) == (26 * MIB, 38 * MIB)
    assert judged(FRAGMENTED, peaks, gpu=GPU, gpu_mem_bytes=room * MIB + context) == (verdict, flushes)


@pytest.mark.parametrize(
    ("gpu_mem", "verdict", "code"),
    [("22GiB", "fits", 0), ("21GiB", "uncertain", 0), ("19GiB", "does-not-fit", 3)],
)
def test_the_command_exits_by_the_verdict(gpu_mem: str, verdict: str, code: int) -> None:
    run = "--method lora --model llama-7b --batch-size 2 --seq-len 512 --no-activation-checkpointing --json"
    result = CliRunner().invoke(estimate_command, [*run.split(), "--gpu-mem", gpu_mem])
    assert result.exit_code == code
    assert json.loads(result.output)["verdict"] == verdict


@pytest.mark.parametrize(
    ("batch_size", "seq_len", "verdict"), [(2, 4096, "fits"), (3, 4096, "fits-after-retries"), (7, 2048, "uncertain")]
)
def test_a_run_that_reserves_more_than_the_card_has_is_not_refused_for_that(
    batch_size: int, seq_len: int, verdict: str
) -> None:
    """LoRA of Mistral 7B on 24 GiB. Without a limit the middle one reserves more than what the largest context leaves,
    the last more than the whole card, and both allocate less: torch's allocator gives back what it caches first, so
    whether a run fits is what its replay under the limit says, and no comparison of reserved with the card."""
    run = "--method lora --model mistral-7b --gpu rtx-3090 --attention flash --activation-checkpointing --drop-outputs"
    size = f"--target-modules q_proj,v_proj --rank 16 --batch-size {batch_size} --seq-len {seq_len} --json"
    result = CliRunner().invoke(estimate_command, [*run.split(), *size.split()])
    assert result.exit_code == 0, result.output
    found = json.loads(result.output)
    assert found["verdict"] == verdict
    assert (found["peak_reserved_bytes"] <= 24 * 1024 * MIB - HIGH) is (verdict == "fits")
    assert (found["peak_reserved_bytes"] > 24 * 1024 * MIB) is (verdict == "uncertain")
    assert found["peak_allocated_bytes"] < 24 * 1024 * MIB - LOW
