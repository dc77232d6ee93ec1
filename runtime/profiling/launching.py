"""What launching costs: the time that this machine's Python needs to tell a device what to do, by kind of task.

A step of the runtime's own code (hooks, exchange, lanes, autograd, transformers' modules) on a model a few numbers wide
has next to nothing to compute: what the thread that launches works between the points where the exchange looks in is
telling. It is counted in the processor's seconds of that thread, so waiting is not in it, nor what the lanes' threads
make it wait for the interpreter's lock. On CUDA operators are launched; elsewhere they are done, which for so few
numbers is as much.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, nullcontext

import torch

from meft.planner.records.plan import Plan
from meft.planner.records.profile_file import Measurement
from meft.planner.timing.chrome import task_kind
from meft.runtime.data.examples import Batch
from meft.runtime.device.device import CudaDevice, Device, EmulatedDevice
from meft.runtime.device.lanes import Overlapped
from meft.runtime.device.timeline import LaneClock
from meft.runtime.profiling.measure import measurement
from meft.runtime.session.documents import unpacked_sequences
from meft.runtime.session.model_loading import model_from_config
from meft.runtime.session.session import Session, open_session

TASKS = ("attention", "router", "ffn", "adapter", "adapter backward", "backward")
LAYERS, HIDDEN_SIZE, VOCABULARY, TOKENS = 8, 16, 64, 8
WARM_UP_STEPS, STEPS = 3, 12


class LaunchTimes:
    """Processor seconds of the calling threads (autograd has its own on CUDA) from one point to the next, by task."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, list[float]] = defaultdict(list)
        self._since: dict[int, float] = {}

    def note(self, task: str) -> None:
        """``task`` has been launched."""
        thread = threading.get_ident()
        since = self._since.get(thread)
        if since is not None:
            self.seconds[task_kind(task)].append(time.thread_time() - since)
        self._since[thread] = time.thread_time()

    def restart(self) -> None:
        """Forget all."""
        self.seconds.clear()
        self._since.clear()


class _LaunchClock(LaneClock):
    """Counts launching, and nothing else."""

    def __init__(self, launch: LaunchTimes) -> None:
        super().__init__()
        self._launch = launch

    def computed(self, name: str) -> None:
        """See :class:`LaneClock`."""
        self._launch.note(name)

    def resume(self) -> None:
        """See :class:`LaneClock`."""


def launch_times(device: torch.device) -> Iterator[Measurement]:
    """Seconds of each task of one layer; on CUDA with the card's own streams."""
    there = CudaDevice(torch.cuda.get_device_properties(device).total_memory) if device.type == "cuda" else _Bare()
    launch = LaunchTimes()
    with unpacked_sequences(), closing(_session(_plan(), there, launch)) as session:
        found = seconds_by_task(session, launch, _batch(), steps=STEPS)
        session.adapter.detach()
    detail = f"one of {LAYERS} LLaMA layers {HIDDEN_SIZE} numbers wide, processor seconds, mean of a step's"
    for task, seconds in found.items():
        yield measurement(f"launch {task}", "s", detail, seconds)


def seconds_by_task(session: Session, launch: LaunchTimes, batch: Batch, *, steps: int) -> dict[str, list[float]]:
    """Of each task of a layer the mean in each of some steps, after some to get going; ``launch`` is told by the
    session's clock."""
    found: dict[str, list[float]] = {task: [] for task in TASKS}
    for step in range(WARM_UP_STEPS + steps):
        launch.restart()
        session.step(batch, loss_scale=1.0)
        session.drain()
        session.device.synchronize()
        if step >= WARM_UP_STEPS:
            for task in TASKS:
                found[task].append(statistics.fmean(launch.seconds[task] or (0.0,)))
    return found


class _Bare(EmulatedDevice):
    """The CPU without a device's books, which take longer than what they are about."""

    def __init__(self) -> None:
        super().__init__(budget_bytes=1 << 30)

    def scope(self) -> AbstractContextManager[object]:
        """Nothing is booked."""
        return nullcontext()

    def host(self) -> AbstractContextManager[object]:
        """Nothing is booked."""
        return nullcontext()

    def category(self, name: str) -> AbstractContextManager[object]:
        """Nothing is booked."""
        del name
        return nullcontext()

    def adopt(self, module: torch.nn.Module) -> torch.nn.Module:
        """It is there."""
        return module


def _plan() -> Plan:
    """Of LLaMA-7B's layers, but fewer and a few numbers wide; Key-Experts, rows kept, looked ahead."""
    import meft

    plan: Plan = meft.plan(
        model="llama-7b",
        gpu="rtx-3090",
        gpu_mem="24GB",
        host_mem="64GB",
        seq_len=TOKENS,
        batch_size=1,
        adapter_width=1024,
        top_k=8,
        routing="key-experts",
        prefetch_depth=1,
        max_slowdown=100.0,
    )
    heads = {"num_heads": 2, "num_kv_heads": 2, "head_dim": HIDDEN_SIZE // 2}
    sizes = {"num_layers": LAYERS, "hidden_size": HIDDEN_SIZE, "intermediate_size": HIDDEN_SIZE} | heads
    shape = plan.request.model.model_copy(update=sizes | {"vocab_size": VOCABULARY})
    formats = {"weights_dtype": "fp32", "adapter_dtype": "fp32"}
    kept = {"cached_rows": plan.decision.adapter_width, "gradients_on_device": True}
    return plan.model_copy(
        update={
            "request": plan.request.model_copy(update=formats | {"model": shape}),
            "decision": plan.decision.model_copy(update=kept),
        }
    )


def _session(plan: Plan, device: Device, launch: LaunchTimes) -> Session:
    shape = plan.request.model
    config = {
        "model_type": "llama",
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "vocab_size": shape.vocab_size,
    }
    with torch.device(device.torch_device):
        model = model_from_config(plan, config)
    return open_session(plan, model, device, seed=0, schedule=Overlapped(), clock=_LaunchClock(launch))


def _batch() -> Batch:
    ids = torch.arange(TOKENS).view(1, -1) % VOCABULARY
    return Batch(ids, ids.clone(), torch.ones_like(ids))
