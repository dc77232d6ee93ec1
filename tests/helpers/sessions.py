"""Sessions of the tiny embedded model on the emulated device, for runtime tests."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from make_plan import hand_plan
from sparse_setup import AMPLE_BYTES, decision

from meft.planner.models.configs import shape_from_config
from meft.planner.records.plan import Plan
from meft.runtime.data.examples import Example
from meft.runtime.device.device import EmulatedDevice
from meft.runtime.session.model_loading import load_frozen_model
from meft.runtime.session.session import Session, open_session
from meft.runtime.training.training import Trainer, TrainingOptions

WIDE: dict[str, object] = {"adapter_width": 128, "top_k": 8, "active_rows_cap": 128}
EXPERTS: dict[str, object] = {"routing": "key-experts", "num_experts": 16, "num_probes": 4}
CENTROIDS: dict[str, object] = EXPERTS | {"routing": "centroid"}
SWITCH: dict[str, object] = {
    "routing": "switch",
    "num_experts": 8,
    "num_probes": 1,
    "switch": {"capacity_factor": 1.25, "jitter": 0.01, "balance_loss": 0.01},
}
STABLE: dict[str, object] = {
    "routing": "stable",
    "num_experts": 8,
    "num_probes": 1,
    "stable": {"first_stage": 0.5, "balance_loss": 0.3},
}


def small_plan(folder: Path, *, choice: dict[str, object] | None = None, **request: object) -> Plan:
    """A plan for the model in ``folder``: width 128, K 8, changed by ``choice`` (the decision) and keyword."""
    config = json.loads((folder / "config.json").read_text())
    shape = shape_from_config(config, name="glass")
    return hand_plan(shape, decision(**(WIDE | (choice or {}))), **request)


def open_small(folder: Path, plan: Plan, *, budget_bytes: int = AMPLE_BYTES, seed: int = 0) -> Session:
    """A session of ``plan`` on an emulated device of its own."""
    return open_session(plan, load_frozen_model(plan, folder), EmulatedDevice(budget_bytes), seed=seed)


def random_examples(count: int, *, length: int, vocab_size: int = 1024, seed: int = 0) -> list[Example]:
    """Sequences to learn by heart, of differing lengths so that there is padding."""
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for index in range(count):
        size = length - index % 5
        ids = tuple(torch.randint(4, vocab_size, (size,), generator=generator).tolist())
        examples.append(Example(ids, ids))
    return examples


def small_trainer(session: Session, *, steps: int, output: Path | None = None, **options: object) -> Trainer:
    """A trainer over eight random examples."""
    settings = TrainingOptions(steps=steps, **({"learning_rate": 1e-2} | options))  # type: ignore[arg-type]
    examples = random_examples(8, length=session.plan.request.seq_len)
    return Trainer(session, examples, settings, pad_id=0, meft_version="0.0.0", output=output)


ByStep = dict[str, list[tuple[int, ...]]]


def rows_by_step(trainer: Trainer) -> ByStep:
    """What a trainer will measure of rows, step by step (or window by window) and by layer: it keeps their sums."""
    kept: ByStep = {}
    for name in ("active_rows", "missing_rows", "overflow_rows", "hot_rows", "kept_rows"):
        sums, seen = getattr(trainer.measured, name), kept.setdefault(name, [])

        def add(counts: Sequence[int], own: Callable[[Sequence[int]], None] = sums.add, seen: list = seen) -> None:
            seen.append(tuple(counts))
            own(counts)

        sums.add = add
    return kept
