"""Nothing that two agents do to the same memory is left to luck: see tests/helpers/happens_before.py.

What delays cannot show: on the emulated device a copy is over when its job is, and on a GPU a missing wait goes wrong
once in a thousand runs. Here it is found in every run, with the operators and the jobs that nothing orders.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from checked_runs import changed, checked_run, save_tiny_llama
from happens_before import Checker
from sessions import EXPERTS

from meft.runtime.exchange import exchange, fetching, gradient_window, hot_rows
from meft.runtime.session import session

LOOK_AHEAD: dict[str, object] = {"prefetch_depth": 1, "rows_in_backward": "refetched"}
RETAINED: dict[str, object] = {"prefetch_depth": 1, "rows_in_backward": "retained"}
SENT: dict[str, object] = {"cached_rows": 40}
SUMMED: dict[str, object] = SENT | {"gradients_on_device": True}
HOT: dict[str, object] = {"hot_rows": 20, "hot_after_steps": 2}
CHOICES: dict[str, dict[str, object]] = {
    "p0": {"prefetch_depth": 0, "rows_in_backward": "refetched"},
    "p0, retained, experts": {"prefetch_depth": 0, "rows_in_backward": "retained", **EXPERTS},
    "p0, in parts, experts, sent": {"prefetch_depth": 0, "gather_chunks": 3, **EXPERTS, **SENT},
    "p1, checkpointing, summed": LOOK_AHEAD | SUMMED | {"activation_checkpointing": True},
    "p1, retained, experts, summed": RETAINED | EXPERTS | SUMMED,
    "p1, sent": LOOK_AHEAD | SENT,
    "p1, hot": LOOK_AHEAD | HOT,
    "p1, hot, experts, summed": LOOK_AHEAD | HOT | EXPERTS | SUMMED,
    "p2, experts": {"prefetch_depth": 2, "rows_in_backward": "refetched", **EXPERTS},
}
IN_BF16 = {"adapter_dtype": "bf16"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("tiny"))


def findings(checker: Checker) -> list[str]:
    """Of a run that was watched at all."""
    assert checker.operators > 1000
    return list(checker.findings)


# --- the code as it is -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overlapped", [True, False], ids=["overlapped", "sequential"])
@pytest.mark.parametrize("max_norm", [1.0, None], ids=["clipped", "early updates"])
@pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES.keys())
def test_training_leaves_nothing_to_luck(folder, choice, max_norm, overlapped) -> None:
    assert findings(checked_run(folder, choice, max_norm=max_norm, overlapped=overlapped)) == []


BESIDE = [
    ("evaluation", "p1, retained, experts, summed"),
    ("evaluation", "p1, hot"),
    ("recall", "p2, experts"),
    ("recall", "p1, hot, experts, summed"),
    ("only forward", "p1, checkpointing, summed"),
    ("only forward", "p2, experts"),
    ("dropped window", "p1, hot, experts, summed"),
    ("written rows", "p1, hot, experts, summed"),
    ("written rows", "p1, sent"),
]


@pytest.mark.parametrize("overlapped", [True, False], ids=["overlapped", "sequential"])
@pytest.mark.parametrize(("beside", "choice"), BESIDE)
def test_what_is_done_between_windows_leaves_nothing_to_luck(folder, beside, choice, overlapped) -> None:
    run = checked_run(folder, CHOICES[choice], overlapped=overlapped, beside=beside, max_norm=None, **IN_BF16)
    assert findings(run) == []


@pytest.mark.parametrize("choice", [LOOK_AHEAD | HOT | {"bf16_copy": True}, LOOK_AHEAD | SUMMED | EXPERTS])
def test_an_adapter_in_another_dtype_leaves_nothing_to_luck(folder, choice) -> None:
    assert findings(checked_run(folder, choice, **IN_BF16)) == []


# --- with one wait less ----------------------------------------------------------------------------------------------

ROWS, WINDOW, FETCH, HOTSET = "RowExchange", "GradientWindow", "RowFetcher", "HotSet"
# Waits that another one makes needless in every schedule (a slot's in forward: its layer's queries come later) are left
# out: without them nothing is wrong.
MUTANTS = {
    "staging is refilled while its copy runs": (
        (fetching, f"{FETCH}._bring", "before.wait_on_host()", "pass"),
        ("p0", {}),
    ),
    "a part of the rows leaves before it is gathered": (
        (fetching, f"{FETCH}._bring", "gathered.result()", "_part(route.result().num_missing, chunk, chunks)"),
        ("p0, in parts, experts, sent", {}),
    ),
    "rows are used when their first part is there": (
        (
            fetching,
            f"{FETCH}._bring",
            "slot.filled = self.engine.copies(",
            "slot.filled = slot.filled if chunk else self.engine.copies(",
        ),
        ("p0, in parts, experts, sent", {}),
    ),
    "queries leave before they are computed": (
        (fetching, f"{FETCH}._send", "point=self.engine.mark()", "point=COPY_DONE"),
        ("p0", {}),
    ),
    "rows are chosen from queries that have not arrived": (
        (fetching, f"{FETCH}._choice", "copy.wait_on_host()", "pass"),
        ("p0", {}),
    ),
    "rows are chosen while they are updated": (
        (fetching, f"{FETCH}._choice", "self.state.updated[target])", ")"),
        ("p0", {}),
    ),
    "rows are used before they arrive": (
        (exchange, f"{ROWS}.rows", "slot.filled.wait_on_device()", "pass"),
        ("p0", {}),
    ),
    "a slot is refilled in backward while it is used": (
        (exchange, f"{ROWS}.after_backward", "self.engine.mark()", "COPY_DONE"),
        ("p1, sent", {}),
    ),
    "gradients leave before they are computed": (
        (gradient_window, f"{WINDOW}._leave", "point=self.engine.mark()", "point=COPY_DONE"),
        ("p0", {}),
    ),
    "a gradient buffer is filled while its last content leaves": (
        (gradient_window, f"{WINDOW}.buffer", "slot.sent.wait_on_device()", "pass"),
        ("p0", {}),
    ),
    "a landing is overwritten before it is summed": (
        (gradient_window, f"{WINDOW}._leave", "after=tuple(slot.landing.readers)", "after=()"),
        ("p0", {}),
    ),
    "gradients are summed before they arrive": (
        (gradient_window, f"{WINDOW}._send_rows", "copy.wait_on_host()", "pass"),
        ("p0", {}),
    ),
    "gradients are summed while those of before are": (
        (gradient_window, f"{WINDOW}._send_rows", "copy.job, self._accumulated[layer],", "copy.job,"),
        ("p1, retained, experts, summed", {}),
    ),
    "sums fill a buffer whose last content leaves": (
        (gradient_window, f"{WINDOW}.send_sums", "slot.sent.wait_on_device()", "pass"),
        ("p1, retained, experts, summed", {}),
    ),
    "the norm is taken of gradients that are still summed": (
        (gradient_window, f"{WINDOW}.squared_norm", "after=(self._accumulated[layer],)", "after=()"),
        ("p0", {}),
    ),
    "rows are updated while their gradients are summed": (
        (gradient_window, f"{WINDOW}.update", "(self._accumulated[layer], *after)", "()"),
        ("p0", {"max_norm": None}),
    ),
    "active rows are counted two at a time": (
        (gradient_window, f"{WINDOW}._count", "after=(last,)", "after=()"),
        ("p1, hot", {}),
    ),
    "keys of hot rows are stored before they arrive": (
        (gradient_window, f"{WINDOW}._store_keys", "copy.wait_on_host()", "pass"),
        ("p1, hot", {}),
    ),
    "keys of hot rows fill a buffer whose last content leaves": (
        (gradient_window, f"{WINDOW}.send_hot_keys", "slot.sent.wait_on_device()", "pass"),
        ("p1, hot", {}),
    ),
    "hot rows are used before they arrive": (
        (hot_rows, f"{HOTSET}._copy", "copy.wait_on_host()", "pass"),
        ("p1, hot", {}),
    ),
    "tokens are used before they arrive": (
        (session, "Session.to_device", ".wait_on_device()", "._issued()"),
        ("p0", {}),
    ),
    "the loss is read before it arrives": (
        (session, "Session.step", "sent.wait_on_host()", "pass"),
        ("p1, sent", {}),
    ),
    "a hidden state is given up while it travels": (
        (fetching, f"{FETCH}.send_queries", "self._held[layer] = hidden", "pass"),
        ("p1, sent", {"beside": "only forward"}),
    ),
}


@pytest.mark.parametrize(("mutant", "run"), MUTANTS.values(), ids=MUTANTS.keys())
def test_a_wait_that_is_missing_is_found(folder, monkeypatch, mutant, run) -> None:
    for module in (exchange, gradient_window):
        monkeypatch.setattr(module, "COPY_DONE", fetching.COPY_DONE, raising=False)
    changed(monkeypatch, *mutant)
    choice, options = run
    assert checked_run(folder, CHOICES[choice], mutated=True, **options).findings
