"""Chunks of tokens: nothing is left to luck, and overlapped a run is the sequential one bit for bit."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pytest
from checked_runs import changed, checked_run, checked_trainer, save_tiny_llama
from happens_before import CheckedDevice
from late_lanes import assert_late_lanes_change_nothing
from sessions import EXPERTS

from meft.planner.base.errors import MeftError
from meft.runtime.chunks import exchange
from meft.runtime.device.engine import COPY_DONE

CHUNKED: dict[str, object] = {"rows_in_backward": "refetched", "token_chunks": 4}
CHOICES: dict[str, dict[str, object]] = {
    "p0": CHUNKED | {"prefetch_depth": 0},
    "p1, experts": CHUNKED | {"prefetch_depth": 1} | EXPERTS,
    "p1, checkpointing": CHUNKED | {"prefetch_depth": 1, "activation_checkpointing": True},
    "p2, own": CHUNKED | {"prefetch_depth": 2, "tokens_see": "own", "token_chunks": 2},
    "p2, wide": CHUNKED | {"prefetch_depth": 2, "token_chunks": 7},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize("overlapped", [True, False], ids=["overlapped", "sequential"])
@pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES.keys())
def test_training_leaves_nothing_to_luck(folder, choice, overlapped) -> None:
    checker = checked_run(folder, choice, overlapped=overlapped, max_norm=None)
    assert checker.operators > 1000
    assert list(checker.findings) == []


@pytest.mark.parametrize(("beside", "choice"), [("evaluation", "p1, experts"), ("only forward", "p2, wide")])
def test_what_is_done_between_windows_leaves_nothing_to_luck(folder, beside, choice) -> None:
    checker = checked_run(folder, CHOICES[choice], beside=beside, adapter_dtype="bf16")
    assert list(checker.findings) == []


CHUNKS = "ChunkedExchange"
# The mark of a slot's last use in forward is left out: the next layer's queries come later in every schedule.
MUTANTS = {
    "a neighbour's slot is refilled while common rows are copied": (
        (exchange, f"{CHUNKS}._assemble", "source.used = self.engine.mark()", "pass"),
        "p1, experts",
    ),
    "rows are used before they arrive": (
        (exchange, f"{CHUNKS}.rows", "slot.filled.wait_on_device()", "pass"),
        "p0",
    ),
    "a slot is refilled in backward while it is used": (
        (exchange, f"{CHUNKS}.chunks_again", "= self.engine.mark()", "= COPY_DONE"),
        "p0",
    ),
}


@pytest.mark.parametrize(("mutant", "choice"), MUTANTS.values(), ids=MUTANTS.keys())
def test_a_wait_that_is_missing_is_found(folder, monkeypatch, mutant, choice) -> None:
    monkeypatch.setattr(exchange, "COPY_DONE", COPY_DONE, raising=False)
    changed(monkeypatch, *mutant)
    device = CheckedDevice()
    with suppress(MeftError, IndexError):  # places that have not arrived may lie anywhere
        checked_trainer(folder, CHOICES[choice], overlapped=True, max_norm=1.0, beside="nothing", device=device)
    assert device.checker.findings


@pytest.mark.parametrize("late", ["cpu", "h2d", "d2h", "all"])
@pytest.mark.parametrize("name", ["p0", "p1, experts", "p1, checkpointing"])
def test_late_lanes_change_nothing(glass_folder, late, name) -> None:
    assert_late_lanes_change_nothing(glass_folder, CHOICES[name], late, 1.0 if late == "cpu" else None, steps=12)
