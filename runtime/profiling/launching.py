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
from contextlib import closing

import torch

from meft.planner.records.plan import Plan
from meft.planner.records.profile_file import Measurement
from meft.planner.timing.chrome import task_kind
from meft.runtime.data.examples import Batch
from meft.runtime.device.device import BareDevice, CudaDevice, Device
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
    there = CudaDevice(torch.cuda.get_device_properties(device).total_memory) if device.type == "cuda" else BareDevice()
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
    kept = {"cached_rows": plan.decision.adapter_width, "gradients_on_device": True}
    fewer = plan.request.model.model_copy(update={"num_layers": LAYERS})
    request = plan.request.model_copy(update={"model": fewer})
    few = plan.model_copy(update={"request": request, "decision": plan.decision.model_copy(update=kept)})
    return narrowed(few, hidden_size=HIDDEN_SIZE, vocab_size=VOCABULARY, seq_len=TOKENS)


def narrowed(plan: Plan, *, hidden_size: int, vocab_size: int, seq_len: int) -> Plan:
    """The plan with layers of two heads that are a few numbers wide, all in fp32, for short sequences."""
    sizes = {"hidden_size": hidden_size, "intermediate_size": hidden_size, "num_heads": 2, "num_kv_heads": 2}
    shape = plan.request.model.model_copy(update=sizes | {"head_dim": hidden_size // 2, "vocab_size": vocab_size})
    update = {"model": shape, "seq_len": seq_len, "weights_dtype": "fp32", "adapter_dtype": "fp32"}
    return plan.model_copy(update={"request": plan.request.model_copy(update=update)})


def llama_of(plan: Plan) -> torch.nn.Module:
    """A LLaMA of the plan's sizes, from random weights."""
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
    return model_from_config(plan, config)


def _session(plan: Plan, device: Device, launch: LaunchTimes) -> Session:
    with torch.device(device.torch_device):
        model = llama_of(plan)
    return open_session(plan, model, device, seed=0, schedule=Overlapped(), clock=_LaunchClock(launch))


def _batch() -> Batch:
    ids = torch.arange(TOKENS).view(1, -1) % VOCABULARY
    return Batch(ids, ids.clone(), torch.ones_like(ids))
