"""The centroid router: worked by hand, current as keys change, exact where all experts are probed, and in a run."""

from __future__ import annotations

import pytest
import torch
from sessions import open_small, small_plan, small_trainer
from sparse_setup import AMPLE_BYTES

from meft.planner.base.errors import UsageError
from meft.runtime.device.device import EmulatedDevice
from meft.runtime.host.centroids import CentroidRouter
from meft.runtime.host.router import TopKRouter
from meft.runtime.session.model_loading import load_frozen_model
from meft.runtime.session.session import open_session


def test_a_token_chooses_in_the_expert_whose_mean_key_it_scores_highest() -> None:
    """Experts {0, 1} with mean (1, 0) and {2, 3} with mean (0, 2): the best row of all, 1, is in the other expert."""
    keys = torch.tensor([[-4.0, 0.0], [6.0, 0.0], [0.0, 1.0], [0.0, 3.0]])
    router = CentroidRouter(top_k=1, active_rows_cap=4, num_experts=2, num_probes=1)
    query = torch.tensor([[1.0, 1.0]])
    assert router.probes(keys, query).tolist() == [[1]]
    assert router.select(0, keys, query, None).rows.tolist() == [3]
    assert TopKRouter(1, 4, 1).select(0, keys, query, None).rows.tolist() == [1]
    keys[0, 0] = 0.0  # updated: the first expert's mean is now (3, 0)
    assert router.select(0, keys, query, None).rows.tolist() == [1]


def test_with_all_experts_probed_it_is_the_exact_choice() -> None:
    generator = torch.Generator().manual_seed(0)
    keys, queries = (torch.randn(size, 8, generator=generator) for size in (32, 5))
    every = CentroidRouter(4, 32, num_experts=8, num_probes=8).select(0, keys, queries, None)
    assert torch.equal(every.rows, TopKRouter(4, 32, 1).select(0, keys, queries, None).rows)


def test_a_run_with_it_needs_nothing_on_the_device_and_learns(glass_folder) -> None:
    plan = small_plan(glass_folder)
    decision = plan.decision
    router = CentroidRouter(decision.top_k, decision.active_rows_cap, num_experts=16, num_probes=4)
    device = EmulatedDevice(AMPLE_BYTES)
    session = open_session(plan, load_frozen_model(plan, glass_folder), device, seed=0, router=router)
    trainer = small_trainer(session, steps=8)
    trainer.run()
    assert sum(trainer.history.losses[-2:]) < sum(trainer.history.losses[:2])
    exact = open_small(glass_folder, plan)
    small_trainer(exact, steps=8).run()
    assert session.device.peaks().allocated_bytes == exact.device.peaks().allocated_bytes
    session.close()
    exact.close()


@pytest.mark.parametrize(
    ("experts", "probes", "says"),
    [(2, 3, "is not between 1 and num_experts"), (3, 1, "do not make as many of equal size"), (8, 1, "or more probes")],
)
def test_what_leaves_nothing_to_choose_from_is_refused(experts, probes, says) -> None:
    keys, queries = torch.zeros(16, 4), torch.zeros(2, 4)
    with pytest.raises(UsageError, match=says):
        CentroidRouter(4, 16, num_experts=experts, num_probes=probes).select(0, keys, queries, None)
