"""A user's own training script, traced on a card that is not there: what it takes, where, and whether it fits."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import runpy
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from meft.planner.allocator.views import Shown, memory_counters, memory_snapshot
from meft.planner.base.errors import MeftError, UsageError
from meft.planner.base.files import write_atomic, writing
from meft.planner.base.schema import Bytes, Index, Record
from meft.planner.base.tracers import tracer
from meft.planner.base.units import parse_bytes
from meft.planner.front.options import RequestOptions
from meft.planner.front.request import gpu_budget
from meft.planner.predict.verdict import Verdict, judged
from meft.planner.records.plan import Phase
from meft.planner.simulation.stream import Stream, stream_peaks

MAX_STEPS = 100
_CAPABILITY = {
    "volta": (7, 0),
    "turing": (7, 5),
    "ampere": (8, 6),
    "ada": (8, 9),
    "hopper": (9, 0),
    "blackwell": (10, 0),
}
"""What ``torch.cuda.get_device_capability`` says of a card of each generation; the A100's is 8.0."""
_LAUNCHERS = ("accelerate", "torchrun")


class PhasePeak(Record):
    """The largest moment of one phase: whole blocks, and requested bytes by module or kind of tensor."""

    phase: Phase
    allocated_bytes: Bytes
    by_module: Mapping[str, int]


class ScriptMemory(Record):
    """What a script's first steps take on a card."""

    gpu: str
    gpu_mem_bytes: Bytes
    steps: Index
    peak_allocated_bytes: Bytes
    peak_reserved_bytes: Bytes
    verdict: Verdict
    cache_flushes: Index
    phases: tuple[PhasePeak, ...]
    not_followed: tuple[str, ...]
    """What the trace had to take for granted, a line each."""


class Trace:
    """Around code that trains: ``with meft.trace(gpu="rtx-3090") as seen:``; afterwards ``seen.memory`` says what it
    takes. The code is left when its steps are done."""

    def __init__(self, *, gpu: str | None, gpu_mem_bytes: int | None, steps: int) -> None:
        if not 1 <= steps <= MAX_STEPS:
            raise UsageError(f"--steps {steps}: give 1 to {MAX_STEPS}")
        budget = gpu_budget(RequestOptions(gpu=gpu, gpu_mem=gpu_mem_bytes))
        self._gpu, self._gpu_mem_bytes = budget.gpu, budget.gpu_mem_bytes
        if self._gpu.shares_host_cores:
            raise UsageError(f"--gpu {self._gpu.key}: a script is traced for a CUDA card; name one, such as rtx-3090")
        self._tracer: Any = tracer("script", purpose="trace")(
            name=self._gpu.name,
            memory_bytes=self._gpu_mem_bytes,
            capability=_capability(self._gpu.architecture),
            workspace_bytes=int(self._gpu.workspace_bytes.value),
            steps=steps,
        )
        self._memory: ScriptMemory | None = None

    def __enter__(self) -> Trace:
        self._tracer.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        done: bool = self._tracer.__exit__(kind, error, traceback)
        return done

    @property
    def memory(self) -> ScriptMemory:
        """What it takes; raises :class:`UsageError` if it allocated nothing on ``cuda``."""
        if self._memory is None:
            self._memory = self._measured()
        return self._memory

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the allocations: ``.pickle`` for pytorch.org/memory_viz, ``.json`` as a Chrome trace."""
        target, events = Path(path), [_shown(event) for event in self._stream().events]
        if target.suffix not in (".pickle", ".json"):
            raise UsageError(f"{target}: name it .pickle for pytorch.org/memory_viz, or .json for a Chrome trace")
        with writing(target):
            if target.suffix == ".json":
                write_atomic(target, json.dumps(memory_counters(events)) + "\n")
            else:
                write_atomic(target, pickle.dumps(memory_snapshot(events), protocol=4))

    def _stream(self) -> Stream:
        stream: Stream = self._tracer.stream
        return stream

    def _measured(self) -> ScriptMemory:
        stream = self._stream()
        if not stream.events:
            raise UsageError("the script put nothing on cuda; does it ask for the card, such as by .to('cuda')?")
        peaks = stream_peaks(stream)
        verdict, flushes = judged(stream, peaks, gpu=self._gpu, gpu_mem_bytes=self._gpu_mem_bytes)
        return ScriptMemory(
            gpu=self._gpu.key,
            gpu_mem_bytes=self._gpu_mem_bytes,
            steps=self._tracer.steps_done,
            peak_allocated_bytes=peaks.allocated_bytes,
            peak_reserved_bytes=peaks.reserved_bytes,
            verdict=verdict,
            cache_flushes=flushes,
            phases=tuple(
                PhasePeak(
                    phase=phase, allocated_bytes=ledger.allocated_bytes, by_module=_largest_first(ledger.by_category)
                )
                for phase, ledger in peaks.ledger.items()
            ),
            not_followed=self._tracer.not_followed,
        )


def trace(*, gpu: str | None = None, gpu_mem: int | str | None = None, steps: int = 2) -> Trace:
    """Code that trains, on a card that is not there: ``with meft.trace(gpu="rtx-3090") as seen: train()``.

    Models come without weights, tensors on ``cuda`` without content; after ``steps`` optimizer steps the context is
    left. Needs torch and transformers. Raises :class:`UsageError` for a card that is not known.
    """
    return Trace(
        gpu=gpu, gpu_mem_bytes=None if gpu_mem is None else parse_bytes(str(gpu_mem), field="gpu_mem"), steps=steps
    )


def trace_script(words: Sequence[str], traced: Trace) -> None:
    """Run ``python train.py ARGS`` inside a trace; what the script prints goes to standard error.

    Raises :class:`UsageError` for a command that is none, and for a script that fails: one line that says where.
    """
    command = _script_of(words)
    with traced, _as_main(command), contextlib.redirect_stdout(sys.stderr):
        try:
            if command[0] == "-m":
                runpy.run_module(command[1], run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(command[0], run_name="__main__")
        except SystemExit as end:
            if end.code not in (None, 0):
                raise UsageError(
                    f"{command[0]}: it ended with exit code {end.code} before its steps were done"
                ) from end
        except MeftError:
            raise
        except Exception as error:
            raise UsageError(f"{_where(error, command[0])}: {type(error).__name__}: {error}") from error


def _script_of(words: Sequence[str]) -> list[str]:
    """The script or ``-m MODULE`` and its arguments, without what starts it."""
    left = list(words)
    if left and Path(left[0]).name.startswith("python"):
        left = left[1:]
    elif left and Path(left[0]).name in _LAUNCHERS:
        script = next((index for index, word in enumerate(left) if word.endswith(".py")), len(left))
        left = left[script:]
    if not left or (left[0] == "-m" and len(left) < 2):
        raise UsageError("which script? Give it behind --, such as: meft-plan trace --gpu rtx-3090 -- python train.py")
    if left[0] != "-m" and not Path(left[0]).is_file():
        raise UsageError(f"{left[0]}: no such script; give it behind --, such as: -- python train.py")
    return left


@contextlib.contextmanager
def _as_main(command: Sequence[str]) -> Iterator[None]:
    """``sys.argv`` and the path of imports as the script expects them."""
    arguments, path = sys.argv, list(sys.path)
    if command[0] == "-m":
        sys.argv, first = list(command[1:]), ""
    else:
        sys.argv, first = list(command), str(Path(command[0]).resolve().parent)
    sys.path.insert(0, first)
    try:
        yield
    finally:
        sys.argv, sys.path[:] = arguments, path


def _where(error: BaseException, script: str) -> str:
    """The script's line from which the error came."""
    line, at = None, error.__traceback__
    while at is not None:
        if at.tb_frame.f_code.co_filename == script:
            line = at.tb_lineno
        at = at.tb_next
    return script if line is None else f"{script}:{line}"


def _capability(architecture: str) -> tuple[int, int]:
    words = architecture.lower().split()
    return (8, 0) if "ga100" in words else _CAPABILITY.get(words[0] if words else "", (8, 0))


def _largest_first(by_module: Mapping[str, int]) -> dict[str, int]:
    return dict(Counter(by_module).most_common())


def _shown(event: Any) -> Shown:
    return Shown(event.tensor, event.num_bytes, event.phase, f"{event.category}: {event.label}")
