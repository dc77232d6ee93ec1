"""How evenly a run used its rows and experts, from the rows' own update counts.

A *dead* row was never active in any window since training began, a dead expert has only dead rows: capacity that the
plan pays for and the data does not use.

Letters: ``R`` adapter rows, ``N`` experts.
"""

from __future__ import annotations

import torch

from meft.planner.records.report import ExpertLoad
from meft.runtime.session.session import Session


def expert_load(session: Session) -> tuple[ExpertLoad, ...]:
    """Per layer; with exact routing all rows are one expert's. Waits for updates under way."""
    session.bring_home()
    num_experts, layers = session.plan.decision.num_experts, range(session.store.num_layers)
    return tuple(_of_layer(layer, _step_counts(session, layer), num_experts) for layer in layers)


def _step_counts(session: Session, layer: int) -> torch.Tensor:
    """Of all rows, whoever has them."""
    if session.tables is None:
        return session.store.layers[layer].step_counts
    return torch.cat(list(session.tables.pieces(f"layers.{layer}.step_counts")))


def _of_layer(layer: int, step_counts: torch.Tensor, num_experts: int) -> ExpertLoad:
    updates = step_counts.view(num_experts, -1).sum(dim=1)
    total = int(updates.sum())
    return ExpertLoad(
        layer=layer,
        num_experts=num_experts,
        dead_experts=int((updates == 0).sum()),
        dead_rows=int((step_counts == 0).sum()),
        busiest_share=int(updates.max()) / total if total else 0.0,
    )
