"""The centroid router: worked by hand, current as keys change, exact where all experts are probed, and in a run."""

from __future__ import annotations

import pytest
import torch
from sessions import CENTROIDS, open_small, small_plan, small_trainer

from meft.planner.base.errors import UsageError
from meft.runtime.host.centroids import CentroidRouter, KeyMeans
from meft.runtime.host.router import TopKRouter
from meft.runtime.session.checkpoint import list_checkpoints
from meft.runtime.session.session import Session
from meft.runtime.use.inference import AS_TRAINED, LayerRows, Serving

KEYS = [[-4.0, 0.0], [6.0, 0.0], [0.0, 1.0], [0.0, 3.0]]
QUERY = torch.tensor([[1.0, 1.0]])


def router_over(keys: torch.Tensor, *, experts: int, probes: int, top_k: int = 1) -> CentroidRouter:
    means = KeyMeans(num_layers=1, num_experts=experts, hidden_size=keys.shape[1], dtype=keys.dtype)
    return CentroidRouter(TopKRouter(top_k, keys.shape[0], experts), means, probes)


def test_a_token_chooses_in_the_expert_whose_mean_key_it_scores_highest() -> None:
    """Experts {0, 1} with mean (1, 0) and {2, 3} with mean (0, 2): the best row of all, 1, is in the other expert."""
    keys = torch.tensor(KEYS)
    router = router_over(keys, experts=2, probes=1)
    assert router.probes(0, keys, QUERY).tolist() == [[1]]
    assert router.select(0, keys, QUERY, None).rows.tolist() == [3]
    assert TopKRouter(1, 4, 1).select(0, keys, QUERY, None).rows.tolist() == [1]


def test_means_are_those_of_the_keys_once_these_are_said_to_have_changed() -> None:
    keys = torch.tensor(KEYS)
    router = router_over(keys, experts=2, probes=1)
    assert router.means.of(0, keys).tolist() == [[1.0, 0.0], [0.0, 2.0]]
    keys[0, 0] = 0.0  # updated: the first expert's mean is now (3, 0)
    assert router.select(0, keys, QUERY, None).rows.tolist() == [3]
    router.means.keys_changed(0)
    assert router.select(0, keys, QUERY, None).rows.tolist() == [1]


def test_with_all_experts_probed_it_is_the_exact_choice() -> None:
    generator = torch.Generator().manual_seed(0)
    keys, queries = (torch.randn(size, 8, generator=generator) for size in (32, 5))
    every = router_over(keys, experts=8, probes=8, top_k=4).select(0, keys, queries, None)
    assert torch.equal(every.rows, TopKRouter(4, 32, 1).select(0, keys, queries, None).rows)


def test_probes_of_a_routers_own_are_refused() -> None:
    keys = torch.tensor(KEYS)
    with pytest.raises(UsageError, match="finds the experts itself"):
        router_over(keys, experts=2, probes=1).select(0, keys, QUERY, torch.zeros(1, 1, dtype=torch.int32))


def _means_by_hand(session: Session) -> list[torch.Tensor]:
    return [tables.keys.reshape(16, 8, -1).mean(dim=1) for tables in session.store.layers]


@pytest.mark.parametrize("hot", [{}, {"hot_rows": 16, "hot_after_steps": 2}], ids=["cold", "hot"])
def test_in_a_run_means_are_current_the_device_holds_nothing_and_it_learns(glass_folder, hot) -> None:
    """After every window the next choice is by the means of the keys as they were updated, hot ones too."""
    session = open_small(glass_folder, small_plan(glass_folder, choice=CENTROIDS | hot))
    store, chosen = session.store, []
    original = CentroidRouter.probes

    def watched(self, layer: int, keys: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
        found = original(self, layer, keys, queries)
        chosen.append(torch.equal(store.means.tables[layer], _means_by_hand(session)[layer]))
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CentroidRouter, "probes", watched)
        trainer = small_trainer(session, steps=8)
        trainer.run()
    assert len(chosen) == 8 * store.num_layers
    assert all(chosen)
    assert sum(trainer.history.losses[-2:]) < sum(trainer.history.losses[:2])
    exact = open_small(glass_folder, small_plan(glass_folder, choice=hot))
    small_trainer(exact, steps=8).run()
    assert session.device.peaks().allocated_bytes == exact.device.peaks().allocated_bytes
    session.close()
    exact.close()


def test_a_run_that_was_interrupted_goes_on_to_the_same_bits(glass_folder, tmp_path) -> None:
    plan = small_plan(glass_folder, choice=CENTROIDS, grad_accum=2)
    whole = small_trainer(open_small(glass_folder, plan), steps=8)
    whole.run()
    first = small_trainer(open_small(glass_folder, plan), steps=8, output=tmp_path, save_every=2)
    first.on_step = lambda progress: setattr(first, "stop_requested", progress.step == 4)
    first.run()
    assert 0 < first.steps_done < 8
    second = small_trainer(open_small(glass_folder, plan), steps=8, output=tmp_path)
    second.resume(list_checkpoints(tmp_path)[-1])
    second.run()
    assert second.history.losses == whole.history.losses
    for mine, theirs in zip(second.session.store.layers, whole.session.store.layers, strict=True):
        assert torch.equal(mine.weights, theirs.weights)


def test_served_a_token_meets_its_own_rows_of_the_experts_it_probes() -> None:
    """By hand: with one probe its own row is 3, of the expert that the means say; rows 0 to 2 count by their shares."""
    keys, values = torch.tensor(KEYS), torch.eye(4)[:, :2]
    values[3] = torch.tensor([5.0, 7.0])
    shares = torch.tensor([0.5, 0.5, 0.25, 1.0])
    rows = LayerRows(keys, values, None, 1, AS_TRAINED, 1, shares, experts_by_means=2)
    # products -4, 6, 1, 3: row 3 is its own, row 1 half of 6, row 2 a quarter of 1 (times a value of zeros)
    assert rows.output(QUERY).tolist() == [[3 * 5.0, 3 * 7.0 + 0.5 * 6.0]]
    alone = LayerRows(keys, values, None, 1, Serving(rows_per_token=1), 1, shares, experts_by_means=2)
    assert alone.output(QUERY).tolist() == [[15.0, 21.0]]
    more = LayerRows(keys, values, None, 1, Serving(rows_per_token=3), 1, shares, experts_by_means=2)
    assert more.output(QUERY).tolist() == [[15.0, 21.0]]  # the other expert's rows are not among its own
