"""What ``--verify`` calls, by the entry points of the group ``meft.verify``: the traces, with nothing printed."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from meft.planner.base.errors import UntraceableError
from meft.planner.records.plan import Plan
from meft.planner.records.setup import TrainingSetup
from meft.planner.simulation.stream import Stream
from meft.runtime.trace.meft import trace_emulated
from meft.runtime.trace.run import WORKSPACE_BYTES, trace_plan, trace_training


def verify_setup(setup: TrainingSetup, config: dict[str, Any], *, workspace_bytes: int = WORKSPACE_BYTES) -> Stream:
    """The traced run of a setup; ``config`` is the model's Hugging Face config."""
    with _quiet():
        return trace_training(setup, config, workspace_bytes=workspace_bytes)


def verify_plan(plan: Plan, config: dict[str, Any], *, workspace_bytes: int = WORKSPACE_BYTES) -> Stream:
    """The traced run of a MEFT plan, with the active rows that it expects."""
    with _quiet():
        return trace_plan(plan, config, workspace_bytes=workspace_bytes)


def verify_emulated(plan: Plan, config: dict[str, Any]) -> Stream:
    """The same on the emulated device, whose operators are the CPU's."""
    with _quiet():
        return trace_emulated(plan, config)


@contextmanager
def _quiet() -> Iterator[None]:
    """No warnings of libraries about what a trace does on purpose, such as checkpointing by its default kind.

    Raises:
        UntraceableError: the model's code asks for what fake tensors do not have.
    """
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise UntraceableError(
            f"the model's code looks at numbers ({error}), and a trace has none; so what it takes cannot be told"
        ) from error
    finally:
        logger.setLevel(level)
