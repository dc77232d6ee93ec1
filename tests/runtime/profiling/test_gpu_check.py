"""What the first person with a card runs: its paths on the emulated device, and what it says without a card."""

from __future__ import annotations

import json

import pytest
import torch
from click.testing import CliRunner
from sessions import EXPERTS, small_plan

import meft
from meft.planner.base.errors import UsageError
from meft.runtime.cli import profile
from meft.runtime.device.device import EmulatedDevice
from meft.runtime.device.nvml import MemoryReading, NvmlUnavailable
from meft.runtime.profiling.gpu_check import GpuCheck, check_plan


class Driver(NvmlUnavailable):
    """Tells that the process holds three quarters of a GiB."""

    def process_memory(self, **_: object) -> MemoryReading:
        return MemoryReading(3 << 28, "a stub of NVML")


@pytest.fixture
def check(glass_folder, tmp_path):
    choice = {"prefetch_depth": 1, "rows_in_backward": "refetched", **EXPERTS}
    plan = small_plan(glass_folder, choice=choice, seq_len=16)
    config = json.loads((glass_folder / "config.json").read_text())
    made = {"make_device": EmulatedDevice, "nvml": Driver("stub"), "steps": 2}
    return check_plan(plan, config, trace=tmp_path / "trace.json", **made)


def test_both_schedules_move_the_plans_bytes_and_hold_the_same_memory(check, tmp_path) -> None:
    overlapped, sequential = check.overlapped, check.sequential
    assert overlapped.h2d_bytes_per_step == sequential.h2d_bytes_per_step > 0
    assert overlapped.d2h_bytes_per_step == sequential.d2h_bytes_per_step > 0
    assert overlapped.allocated_bytes == pytest.approx(sequential.allocated_bytes, rel=0.05)
    assert all(lanes > 0 for each in (overlapped, sequential) for lanes in each.lanes_seconds.values())
    assert set(overlapped.lanes_seconds) == {"h2d", "d2h", "cpu", "gpu"}
    assert 0 < check.practicality < 1.0 + 1e-9
    names = {event["name"] for event in json.loads((tmp_path / "trace.json").read_text())["traceEvents"]}
    assert {"route 1", "rows 1", "ffn 1"} <= names


def test_it_is_one_file_and_one_page(check, tmp_path) -> None:
    both = GpuCheck("a machine", {"torch": "2"}, (check,), ("llama-7b: too large",))
    both.save(tmp_path / "check.json")
    saved = json.loads((tmp_path / "check.json").read_text())
    assert saved["plans"][0]["overlapped"]["process_bytes"] == 3 << 28
    page = (tmp_path / "check.txt").read_text().splitlines()
    assert len(page) < 60
    assert any("768.0 MiB by a stub of NVML" in line for line in page)
    assert page[-1] == "skipped: llama-7b: too large"


def test_without_a_gpu_it_says_what_it_skips_and_is_content(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = CliRunner().invoke(profile.command, ["gpu-check", "-o", str(tmp_path / "check.json")])
    assert done.exit_code == 0, done.output
    assert "skipped: steps of plans, memory by the driver, overlap: torch sees no CUDA device here" in done.output
    saved = json.loads((tmp_path / "check.json").read_text())
    assert (saved["plans"], len(saved["skipped"])) == ([], 1)


def test_a_card_that_is_too_small_for_7b_is_checked_with_less(monkeypatch, tmp_path) -> None:
    def plan(*, model: str, **_: object) -> str:
        if model == "llama-7b":
            raise UsageError("nothing fits\nwhat would")
        return model

    monkeypatch.setattr(meft, "plan", plan, raising=False)
    skipped: list[str] = []
    assert profile._first_plan(tmp_path / "hardware.json", 8 << 30, skipped) == "llama-3.2-3b"
    assert skipped == ["llama-7b at 8.00 GiB: nothing fits"]
