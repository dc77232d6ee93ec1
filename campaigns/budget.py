"""Accepted plans run: random plans of random small models, made, made again at their own peak, and run.

A trial draws a small model of random shape and, for it, :data:`REQUESTS` requests, each of which is

1. planned with room; the plan is run on the emulated device: what it allocates and reserves is no more than predicted;
2. planned again with ``--gpu-mem`` equal to the plan's own ``peak_reserved_bytes_at_cap``: it is accepted, and runs
   within that budget;
3. asked for with a part of that memory: the answer is a plan, which runs within it, or a change that is proposed, which
   makes a plan; that runs too.

Weights and tokens are random; how many rows are active is what these choose, up to the cap, or drawn anew in every
step. A trial depends on its seed and number; results of several sessions add up in ``--json FILE``.

    python campaigns/budget.py --count 1700 --seed 1 --json campaigns/results/budget.json
"""

from __future__ import annotations

import gc
import os
import random
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

import click
import torch
from record import Record
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from meft.planner.base.errors import DeviceOutOfMemory, Infeasible
from meft.planner.base.units import parse_bytes
from meft.planner.models.configs import shape_from_config
from meft.planner.predict.prediction import ProfileSet
from meft.planner.records.plan import Plan, Request
from meft.planner.records.profile_catalogue import load_gpu, load_host, load_link, load_sparsity
from meft.planner.search.infeasible import OPTIONS
from meft.planner.search.search import make_plan
from meft.runtime.data.examples import Batch
from meft.runtime.device.device import EmulatedDevice, MemoryPeaks
from meft.runtime.device.lanes import Overlapped, Sequential
from meft.runtime.host.router import Selection
from meft.runtime.session.model_loading import ATTENTION, COMPUTE_DTYPES
from meft.runtime.session.session import WindowEnd, open_session

AMPLE_BYTES = 1 << 33
REQUESTS = 2
WINDOWS = 2
"""Hot rows are chosen after the first, and live on the device in the second."""
USUAL_LOGITS, MOST_LOGITS = 1 << 18, 1 << 22
"""Elements of a micro-batch's logits: most trials stay small, a few have tensors beyond the allocator's 20 MiB."""
EXACT = ("llama", "mistral", "qwen2", "qwen3")
"""Model types whose every tensor the simulated step knows."""
OTHERS = ("gemma", "gemma2", "phi", "phi3", "gpt_neox", "gpt2")


@dataclass
class Case:
    """A trial under way: its dice, what its plans train beside, and where its outcome goes."""

    number: int
    rng: random.Random
    config: dict[str, Any]
    weights_dtype: str
    attention: str
    record: Record

    @classmethod
    def drawn(cls, number: int, record: Record) -> Case:
        """The trial of that number."""
        rng = random.Random(f"{record.seed}:{number}")
        config = draw_config(rng, EXACT if rng.random() < 0.7 else OTHERS)
        weights = rng.choice(("fp32", "fp32", "bf16"))
        attention = "eager" if config["model_type"] == "gemma2" or rng.random() < 0.25 else "sdpa"
        return cls(number, rng, config, weights, attention, record)

    def model(self, request: Request) -> PreTrainedModel:
        """The model that a plan of that request trains beside."""
        options = dict(self.config)
        return AutoModelForCausalLM.from_config(  # type: ignore[no-any-return]
            AutoConfig.for_model(options.pop("model_type"), **options),
            dtype=COMPUTE_DTYPES[request.weights_dtype],
            attn_implementation=ATTENTION[request.attention],
        )

    def fail(self, why: str) -> bool:
        """Note it; False."""
        self.record.fail(self.number, f"{self.config['model_type']}: {why}")
        return False


class AnyRows:
    """A router that chooses a random number of random rows up to the cap: what batches of any data could do."""

    def __init__(self, cap: int, width: int, seed: int) -> None:
        self._cap, self._width = cap, width
        self._generator = torch.Generator().manual_seed(seed)

    def select(self, layer: int, keys: torch.Tensor, queries: torch.Tensor, probes: torch.Tensor | None) -> Selection:
        """Some rows, ascending."""
        del layer, keys, queries, probes
        share = torch.rand((), generator=self._generator).item()
        count = self._cap if share > 0.8 else 1 + int(share * (self._cap - 1))
        rows = torch.randperm(self._width, generator=self._generator)[:count].sort().values
        return Selection(rows)


# --- drawing a case -------------------------------------------------------------------------------------------------


def draw_config(rng: random.Random, model_types: tuple[str, ...]) -> dict[str, Any]:
    """A small model's Hugging Face config."""
    model_type = rng.choice(model_types)
    heads, head_dim = rng.choice((2, 4)), rng.choice((16, 32, 64))
    hidden, inner = heads * head_dim, rng.choice((2, 3)) * heads * head_dim
    layers, vocab = rng.choice((1, 1, 2, 2, 3)), rng.choice((256, 256, 1000, 1000, 4096, 16384))
    if model_type == "gpt2":
        return {
            "model_type": model_type,
            "n_embd": hidden,
            "n_layer": layers,
            "n_head": heads,
            "n_inner": inner,
            "vocab_size": vocab,
            "n_positions": 512,
            "bos_token_id": 0,
            "eos_token_id": 0,
            **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0),
        }
    config = {
        "model_type": model_type,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": inner,
        "vocab_size": vocab,
        "max_position_embeddings": 512,
        "pad_token_id": None,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "tie_word_embeddings": rng.random() < 0.5,
    }
    if model_type not in ("phi", "gpt_neox"):
        config["num_key_value_heads"] = rng.choice((1, heads // 2, heads))
    if model_type in ("qwen3", "gemma", "gemma2"):
        config["head_dim"] = head_dim
    return config


def draw_request(case: Case) -> Request:
    """A request with room, most of whose choices are made, so that there are few decisions to weigh."""
    rng = case.rng
    shape = shape_from_config(case.config, name=case.config["model_type"])
    width = rng.choice((64, 128, 256, 320))
    batch_size, seq_len = draw_batch(rng, shape.vocab_size)
    return Request(
        model=shape,
        gpu="emulated",
        host="emulated",
        link="emulated",
        sparsity="meft-paper",
        gpu_mem_bytes=AMPLE_BYTES,
        host_mem_bytes=AMPLE_BYTES,
        host_mem_basis="given",
        batch_size=batch_size,
        seq_len=seq_len,
        grad_accum=rng.choice((1, 1, 1, 2, 3)),
        weights_dtype=case.weights_dtype,  # type: ignore[arg-type]
        adapter_dtype=rng.choice(("fp32", "bf16")),
        attention=case.attention,  # type: ignore[arg-type]
        activation_checkpointing=rng.random() < 0.3,
        objective=rng.choice(("capacity", "speed", "traffic")),
        max_slowdown=1000.0,
        min_trainable_fraction=0.0,
        adapter_width=width,
        top_k=rng.choice((2, 4, 16)),
        prefetch_depth=rng.randrange(shape.num_layers),
        routing=rng.choice(("exact", "key-experts")),
        rows_in_backward=rng.choice(("refetched", "retained")),
        hot_rows=rng.choice((0, 0, 0, width // 4)),
        bf16_copy=None,
    )


def draw_batch(rng: random.Random, vocab_size: int) -> tuple[int, int]:
    """Sequences of a micro-batch and their length: few tokens beside a large vocabulary, in most trials."""
    most = MOST_LOGITS if rng.random() < 0.1 else USUAL_LOGITS
    sizes = [
        (batch, length)
        for batch in (1, 2, 4)
        for length in (16, 50, 64, 128, 192)
        if batch * length * vocab_size <= most
    ]
    return rng.choice(sizes or [(1, 16)])


def profiles() -> ProfileSet:
    """The emulated device's."""
    gpu = load_gpu("emulated")
    return ProfileSet(gpu, load_link("emulated"), load_host("emulated"), load_sparsity("meft-paper"))


# --- running a plan -------------------------------------------------------------------------------------------------


def run(plan: Plan, case: Case) -> MemoryPeaks:
    """Two windows on an emulated device of the plan's budget; raises :class:`DeviceOutOfMemory` past it."""
    rng, request, decision = case.rng, plan.request, plan.decision
    device = EmulatedDevice(plan.prediction.device_memory.allocator_budget_bytes)
    router = AnyRows(decision.active_rows_cap, decision.adapter_width, rng.randrange(1 << 30))
    session = open_session(
        plan,
        case.model(request),
        device,
        seed=0,
        compiled=False,
        schedule=Overlapped() if rng.random() < 0.5 else Sequential(),
        around=(lambda _: router) if rng.random() < 0.7 else None,
    )
    end = WindowEnd(1e-4, rng.choice((None, 1.0)))
    generator = torch.Generator().manual_seed(rng.randrange(1 << 30))
    try:
        for _ in range(WINDOWS):
            for left in reversed(range(request.grad_accum)):
                size = (request.batch_size, request.seq_len)
                ids = torch.randint(0, request.model.vocab_size, size, generator=generator)
                session.step(
                    Batch(ids, torch.ones_like(ids), ids.clone()), loss_scale=1.0, window_end=None if left else end
                )
            session.optimizer_step(learning_rate=end.learning_rate, max_norm=end.max_norm)
        session.drain()
        return device.peaks()
    finally:
        session.adapter.detach()
        session.close()


# --- one trial ------------------------------------------------------------------------------------------------------


def trial(number: int, record: Record, chosen: ProfileSet) -> None:
    """A model and its requests; each is counted, and what fails is noted."""
    case = Case.drawn(number, record)
    for _ in range(REQUESTS):
        record.counts["requests"] += 1
        record.counts["requests passed"] += check_request(case, draw_request(case), chosen)


def check_request(case: Case, request: Request, chosen: ProfileSet) -> bool:
    """Plan, run, plan at the peak, run, ask for less; whether every promise was kept."""
    plan = planned(request, chosen)
    if isinstance(plan, Infeasible):
        return case.fail(f"with ample room: {plan.message}")
    kept = keeps_its_word(case, "with room", plan)
    peak = plan.prediction.device_memory.peak_reserved_bytes_at_cap or 0
    again = planned(request.model_copy(update={"gpu_mem_bytes": peak}), chosen)
    if isinstance(again, Infeasible):
        return case.fail(f"at its own peak of {peak:,} bytes: {again.message}")
    kept &= keeps_its_word(case, "at its own peak", again)
    less = max(1, int(peak * case.rng.uniform(0.3, 1.0)))
    return kept & answers_with_less(case, request.model_copy(update={"gpu_mem_bytes": less}), chosen)


def planned(request: Request, chosen: ProfileSet) -> Plan | Infeasible:
    """The plan; its hot rows are chosen at once, so that few steps see them."""
    plan = make_plan(request, chosen, meft_version="campaign")
    if isinstance(plan, Infeasible):
        return plan
    return plan.model_copy(update={"decision": plan.decision.model_copy(update={"hot_after_steps": 1})})


def keeps_its_word(case: Case, name: str, plan: Plan) -> bool:
    """Run it: no out-of-memory, and no more allocated or reserved than predicted."""
    counts, memory = case.record.counts, plan.prediction.device_memory
    counts["plans run"] += 1
    counts[f"run {name}"] += 1
    try:
        peaks = run(plan, case)
    except DeviceOutOfMemory as error:
        return case.fail(f"{name}: {error}")
    pairs = {
        "reserved": (peaks.reserved_bytes, memory.peak_reserved_bytes),
        "allocated": (peaks.allocated_bytes, memory.peak_allocated_bytes),
    }
    for quantity, (observed, predicted) in pairs.items():
        case.record.note_largest(f"{quantity}, observed over predicted", observed / predicted)
        counts[f"{quantity} as predicted"] += observed == predicted
        if observed > predicted:
            return case.fail(f"{name}: {quantity} {observed:,} bytes, predicted {predicted:,}")
    counts["plans run and passed"] += 1
    return True


def answers_with_less(case: Case, request: Request, chosen: ProfileSet) -> bool:
    """With a part of the memory: a plan that runs in it, or a proposed change that makes one."""
    answer, counts = planned(request, chosen), case.record.counts
    if isinstance(answer, Infeasible):
        counts["infeasible"] += 1
        if not answer.suggestion:
            counts["infeasible without a proposal"] += 1
            return True
        answer = planned(with_options(request, answer.suggestion), chosen)
        if isinstance(answer, Infeasible):
            return case.fail(f"with what was proposed: {answer.message}")
        counts["proposals that make a plan"] += 1
    return keeps_its_word(case, "with less", answer)


def with_options(request: Request, options: dict[str, str]) -> Request:
    """The request with options of ``meft-plan`` changed."""
    field_of = {option: name for name, option in OPTIONS.items()}
    update: dict[str, object] = {}
    for option, value in options.items():
        name = field_of.get(option) or field_of[f"--{option.removeprefix('--no-')}"]
        kind = type(getattr(request, name))
        if name.endswith("_bytes"):
            update[name] = parse_bytes(value)
        elif not value:
            update[name] = option in field_of
        else:
            update[name] = value if kind is str else kind(value)
    return request.model_copy(update=update)


# --- the campaign ---------------------------------------------------------------------------------------------------


def campaign(record: Record, count: int, *, seconds: float | None = None) -> Record:
    """Trials up to the ``count``-th of the seed, or as many as fit ``seconds``."""
    torch.set_num_threads(1)
    chosen = profiles()
    for number in record.numbers(count, seconds=seconds):
        trial(number, record, chosen)
        if number % 64 == 0:
            gc.collect()
    return record


@click.command()
@click.option("--count", default=100, show_default=True, type=click.IntRange(1), help="How many trials in all.")
@click.option("--seed", default=0, show_default=True, type=int, help="What the trials are drawn from.")
@click.option("--json", "path", type=click.Path(path_type=Path), help="Where results add up.")
@click.option("--seconds", type=float, help="Begin no trial after so long; the same command goes on.")
@click.option("--only", type=click.IntRange(0), help="This trial alone, noted nowhere.")
def main(count: int, seed: int, path: Path | None, seconds: float | None, only: int | None) -> None:
    """Random small plans, run on the emulated device."""
    record = Record("budget", seed, path if only is None else None)
    if only is None:
        campaign(record, count, seconds=seconds)
    else:
        trial(only, record, profiles())
    record.tell()
    sys.exit(1 if record.failures else 0)


if __name__ == "__main__":
    main()
