"""``meft-run --gpus N``: torchrun's elastic launcher with as many ranks, on this machine.

What ``torchrun --nproc-per-node N -m meft.run ...`` does, with one line instead of a record when a rank fails, and no
limit on how long ranks may take to end their window when a signal comes.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
import uuid
from collections.abc import Sequence
from typing import NoReturn

from meft.planner.base.errors import EXIT_MACHINE, EXIT_UNEXPECTED, MeftError, UsageError
from meft.planner.base.options import torchrun_words
from meft.planner.records.plan import Plan

TO_END_SECONDS = 24 * 3600
"""For the window and the checkpoint after a signal; a second signal ends the run at once."""


TO_SPEAK_SECONDS = 5.0


class RankFailed(MeftError):
    """A rank failed; the code is its own where that is a documented one."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def ranks_begun() -> tuple[int, int]:
    """On how many machines, and how many on each, ``torchrun`` says that there are ranks; 1 where it says nothing."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    here = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    return size // here, here


def ranks_to_launch(gpus: int | None, nodes: int | None, plan: Plan, *, rehearse: bool) -> int:
    """How many ranks this process begins; 1 where it is one of several already, or rehearses a rank's step.

    Raises :class:`UsageError` for several machines, on each of which torchrun begins them, and for numbers that are not
    those that it has begun.
    """
    machines, here = ranks_begun()
    if rehearse or machines * here > 1:
        for option, given, present in (("--gpus", gpus, here), ("--nodes", nodes, machines)):
            if not rehearse and given not in (None, present):
                raise UsageError(f"{option} {given}: torchrun began {present}; leave {option} out, or give {present}")
        return 1
    gpus, nodes = gpus or plan.request.gpus, nodes or plan.request.nodes
    if nodes > 1:
        words = " ".join(torchrun_words(nodes=nodes, gpus=gpus))
        raise UsageError(f"--nodes {nodes}: start it on each machine, where HOST is one of them: {words} plan.json ...")
    return gpus


def wait_for_first_rank() -> None:
    """Before a rank that is not the first says what went wrong: mostly all fail alike, and the first has said it."""
    if ranks_begun() != (1, 1) and os.environ["RANK"] != "0":
        time.sleep(TO_SPEAK_SECONDS)


def end(exit_code: int) -> NoReturn:
    """Exit after an error: a rank of several machines at once, as what another one never sends would keep it alive."""
    if ranks_begun()[0] > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_code)
    sys.exit(exit_code)


def launch(arguments: Sequence[str], *, ranks: int) -> int:
    """Run ``python -m meft.run`` with these arguments in each of ``ranks`` processes; the exit code.

    A rank that ends with a documented code has said why. Raises :class:`RankFailed` where none could.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // ranks)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        shutdown_timeout=TO_END_SECONDS,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "meft.run", *arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if 0 < failure.exitcode <= EXIT_MACHINE or failure.exitcode > 128:
            return failure.exitcode
        how = f"exit code {failure.exitcode}"
        if failure.exitcode < 0:
            how = signal.Signals(-failure.exitcode).name
        raise RankFailed(
            f"rank {rank} (process {failure.pid}) ended with {how}, and all others with it; what was saved is whole: "
            f"go on with --resume",
            EXIT_UNEXPECTED,
        ) from None
    except SignalException as error:
        return 128 + error.sigval
    return 0
