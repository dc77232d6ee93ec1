"""Accepted plans run: random plans of random small models, made, made again at their own peak, and run.

For each case a small model of random shape and a request are drawn, and

1. planned with room; the plan is run on the emulated device: what it allocates and reserves is no more than predicted;
2. planned again with ``--gpu-mem`` equal to the plan's own ``peak_reserved_bytes_at_cap``: it is accepted, and runs
   within that budget;
3. asked for with a part of that memory: the answer is a plan, which runs within it, or a change that is proposed, which
   makes a plan; that runs too.

Weights and tokens are random; how many rows are active is what these choose, up to the cap, or drawn anew in every
step.

    python campaigns/budget.py --count 1000 --seed 1 --json campaigns/results/budget.json
"""

from __future__ import annotations

import gc
import json
import random
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import torch
from transformers import AutoConfig, AutoModelForCausalLM

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
WINDOWS = 3
EXACT = ("llama", "mistral", "qwen2", "qwen3")
"""Model types whose every tensor the simulated step knows."""
OTHERS = ("gemma", "gemma2", "phi", "phi3", "gpt_neox", "gpt2")


@dataclass
class Tally:
    """What was tried, and what failed: the case's number and why."""

    counts: Counter[str] = field(default_factory=Counter)
    failures: list[dict[str, object]] = field(default_factory=list)
    largest_ratio: dict[str, float] = field(default_factory=dict)
    """Observed over predicted."""

    def note(self, name: str, observed: float, predicted: float) -> None:
        """Keep the largest ratio of a quantity."""
        self.largest_ratio[name] = max(self.largest_ratio.get(name, 0.0), round(observed / predicted, 6))

    def fail(self, case: int, why: str) -> None:
        """A promise was not kept."""
        self.counts["failed"] += 1
        self.failures.append({"case": case, "why": why})


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
    layers, vocab = rng.choice((1, 2, 2, 3, 4)), rng.choice((256, 1000, 4096, 16384))
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


def draw_request(rng: random.Random, config: dict[str, Any]) -> Request:
    """A request with room, most of whose choices are made, so that there are few decisions to weigh."""
    shape = shape_from_config(config, name=config["model_type"])
    width = rng.choice((64, 128, 256, 320))
    weights = rng.choice(("fp32", "fp32", "bf16"))
    eager = config["model_type"] == "gemma2" or rng.random() < 0.25
    return Request(
        model=shape,
        gpu="emulated",
        host="emulated",
        link="emulated",
        sparsity="meft-paper",
        gpu_mem_bytes=AMPLE_BYTES,
        host_mem_bytes=AMPLE_BYTES,
        host_mem_basis="given",
        batch_size=rng.choice((1, 2, 4)),
        seq_len=rng.choice((16, 50, 64, 128, 192)),
        grad_accum=rng.choice((1, 1, 2, 3)),
        weights_dtype=weights,
        adapter_dtype=rng.choice(("fp32", "bf16")),
        attention="eager" if eager else "sdpa",
        activation_checkpointing=rng.random() < 0.4,
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


def profiles() -> ProfileSet:
    """The emulated device's."""
    gpu = load_gpu("emulated")
    return ProfileSet(gpu, load_link("emulated"), load_host("emulated"), load_sparsity("meft-paper"))


# --- running a plan -------------------------------------------------------------------------------------------------


def run(plan: Plan, config: dict[str, Any], rng: random.Random) -> MemoryPeaks:
    """A few windows on an emulated device of the plan's budget; raises :class:`DeviceOutOfMemory` past it."""
    options = dict(config)
    made = AutoConfig.for_model(options.pop("model_type"), **options)
    request, decision = plan.request, plan.decision
    model = AutoModelForCausalLM.from_config(
        made, dtype=COMPUTE_DTYPES[request.weights_dtype], attn_implementation=ATTENTION[request.attention]
    )
    device = EmulatedDevice(plan.prediction.device_memory.allocator_budget_bytes)
    router = AnyRows(decision.active_rows_cap, decision.adapter_width, rng.randrange(1 << 30))
    schedule = Overlapped() if rng.random() < 0.5 else Sequential()
    session = open_session(
        plan,
        model,
        device,
        seed=0,
        compiled=False,
        schedule=schedule,
        router=router if rng.random() < 0.7 else None,
    )
    max_norm = rng.choice((None, 1.0))
    end = WindowEnd(1e-4, max_norm)
    generator = torch.Generator().manual_seed(rng.randrange(1 << 30))
    try:
        for _ in range(WINDOWS):
            for left in reversed(range(request.grad_accum)):
                size = (request.batch_size, request.seq_len)
                ids = torch.randint(0, request.model.vocab_size, size, generator=generator)
                session.step(
                    Batch(ids, torch.ones_like(ids), ids.clone()), loss_scale=1.0, window_end=None if left else end
                )
            session.optimizer_step(learning_rate=1e-4, max_norm=max_norm)
        session.drain()
        return device.peaks()
    finally:
        session.adapter.detach()
        session.close()


# --- one case -------------------------------------------------------------------------------------------------------


def check_case(case: int, seed: int, tally: Tally, chosen: ProfileSet, model_types: tuple[str, ...]) -> None:
    """Plan, run, plan at the peak, run, ask for less; what fails is noted."""
    rng = random.Random(f"{seed}:{case}")
    config = draw_config(rng, model_types)
    request = draw_request(rng, config)
    plan = planned(request, chosen)
    if isinstance(plan, Infeasible):
        tally.fail(case, f"with ample room: {plan.message}")
        return
    promised = keeps_its_word(case, "with room", plan, config, rng, tally)
    peak = plan.prediction.device_memory.peak_reserved_bytes_at_cap or 0
    again = planned(request.model_copy(update={"gpu_mem_bytes": peak}), chosen)
    if isinstance(again, Infeasible):
        tally.fail(case, f"at its own peak of {peak:,} bytes: {again.message}")
    else:
        promised &= keeps_its_word(case, "at its own peak", again, config, rng, tally)
    promised &= answers_with_less(case, request, peak, config, chosen, rng, tally)
    tally.counts["passed"] += promised


def planned(request: Request, chosen: ProfileSet) -> Plan | Infeasible:
    """The plan; its hot rows are chosen at once, so that few steps see them."""
    plan = make_plan(request, chosen, meft_version="campaign")
    if isinstance(plan, Infeasible):
        return plan
    return plan.model_copy(update={"decision": plan.decision.model_copy(update={"hot_after_steps": 1})})


def keeps_its_word(case: int, name: str, plan: Plan, config: dict[str, Any], rng: random.Random, tally: Tally) -> bool:
    """Run it: no out-of-memory, and no more allocated or reserved than predicted."""
    tally.counts[f"runs {name}"] += 1
    memory = plan.prediction.device_memory
    try:
        peaks = run(plan, config, rng)
    except DeviceOutOfMemory as error:
        tally.fail(case, f"{name}: {error}")
        return False
    pairs = {
        "reserved": (peaks.reserved_bytes, memory.peak_reserved_bytes),
        "allocated": (peaks.allocated_bytes, memory.peak_allocated_bytes),
    }
    for quantity, (observed, predicted) in pairs.items():
        tally.note(quantity, observed, predicted)
        tally.counts[f"{quantity} as predicted"] += observed == predicted
        if observed > predicted:
            tally.fail(case, f"{name}: {quantity} {observed:,} bytes, predicted {predicted:,}")
            return False
    return True


def answers_with_less(
    case: int,
    request: Request,
    peak: int,
    config: dict[str, Any],
    chosen: ProfileSet,
    rng: random.Random,
    tally: Tally,
) -> bool:
    """With a part of the memory: a plan that runs in it, or a proposed change that makes one."""
    less = request.model_copy(update={"gpu_mem_bytes": max(1, int(peak * rng.uniform(0.3, 1.0)))})
    answer = planned(less, chosen)
    if isinstance(answer, Infeasible):
        tally.counts["infeasible"] += 1
        if not answer.suggestion:
            tally.counts["infeasible without a proposal"] += 1
            return True
        answer = planned(with_options(less, answer.suggestion), chosen)
        if isinstance(answer, Infeasible):
            tally.fail(case, f"with what was proposed: {answer.message}")
            return False
        tally.counts["proposals that make a plan"] += 1
    return keeps_its_word(case, "with less", answer, config, rng, tally)


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


def campaign(count: int, seed: int, *, model_types: tuple[str, ...] = EXACT, seconds: float | None = None) -> Tally:
    """``count`` cases, or as many as fit ``seconds``."""
    torch.set_num_threads(1)
    tally, chosen, started = Tally(), profiles(), time.monotonic()
    for case in range(count):
        if seconds is not None and time.monotonic() - started > seconds:
            break
        tally.counts["tried"] += 1
        check_case(case, seed, tally, chosen, model_types)
        if case % 64 == 0:
            gc.collect()
    return tally


@click.command()
@click.option("--count", default=100, show_default=True, type=click.IntRange(1), help="How many cases.")
@click.option("--seed", default=0, show_default=True, type=int, help="What the cases are drawn from.")
@click.option("--json", "path", type=click.Path(path_type=Path), help="Where the result goes.")
@click.option("--seconds", type=float, help="Stop after so long, with the cases that were tried by then.")
@click.option("--all-models", is_flag=True, help=f"Draw model types besides {', '.join(EXACT)} too.")
def main(count: int, seed: int, path: Path | None, seconds: float | None, all_models: bool) -> None:
    """Random small plans, run on the emulated device."""
    types = (*EXACT, *OTHERS) if all_models else EXACT
    tally = campaign(count, seed, model_types=types, seconds=seconds)
    result = {
        "campaign": "budget",
        "command": f"python campaigns/budget.py --count {tally.counts['tried']} --seed {seed}"
        + (" --all-models" if all_models else ""),
        "seed": seed,
        "model_types": types,
        "counts": dict(sorted(tally.counts.items())),
        "largest_observed_over_predicted": tally.largest_ratio,
        "failures": tally.failures[:100],
    }
    text = json.dumps(result, indent=1)
    if path is not None:
        path.write_text(text + "\n", encoding="utf-8")
    click.echo(text)
    sys.exit(1 if tally.failures else 0)


if __name__ == "__main__":
    main()
