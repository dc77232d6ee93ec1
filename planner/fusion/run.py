"""Both ends of what a step of a compiled model needs.

Which results ``torch.compile`` fuses away, and which it computes again in backward instead of saving them, depends on
its version and on where the model's code breaks its graph. What can be said is a range.
"""

from __future__ import annotations

from meft.planner.allocator.cublas import USUAL_BYTES
from meft.planner.fusion.operators import FusedOperators
from meft.planner.fusion.tape import FusedTape, GatheringTape
from meft.planner.records.setup import TrainingSetup
from meft.planner.simulation.run import simulate
from meft.planner.simulation.stream import Stream


def simulate_unfused(setup: TrainingSetup, *, workspace_bytes: int = USUAL_BYTES) -> Stream:
    """The stream of the most that a compiled step needs: the eager one, with the mask that traced code makes, and all
    gradients handed out at the end of backward. What inductor's own kernels and CUDA graphs take is not in it.

    Raises :class:`ValueError` where :func:`~meft.planner.simulation.run.simulate` does.
    """
    return simulate(setup, workspace_bytes=workspace_bytes, tape=GatheringTape())


def simulate_fused(setup: TrainingSetup, *, workspace_bytes: int = USUAL_BYTES) -> Stream:
    """The stream of the least that it needs: no elementwise temporary, and only that saved for backward which a
    min-cut would save (:mod:`meft.planner.fusion.operators`).

    Raises :class:`ValueError` where :func:`~meft.planner.simulation.run.simulate` does.
    """
    eager = setup.model_copy(update={"compiled": False})
    return simulate(eager, workspace_bytes=workspace_bytes, tape=FusedTape(), operators=FusedOperators)
