"""Measure the activation sparsity of a MEFT adapter on SmolLM2-135M with airport facts, as a sparsity profile.

    python benchmarks/smollm2_sparsity.py [--steps 30] [-o FILE.json]

For each prefetch depth an adapter is trained for some steps on the emulated device without a cap; the active rows of
depth 0 give each layer's ``alpha`` (from ``A/R = 1 - (1 - K/R)^(T^alpha)``, A the mean over steps), and a probe after
the steps gives the recall of looking ahead. ``T`` counts positions, padding included, as the planner does: the profile
holds for data that fills its sequences as much as this does, which the result states. This is how the shipped profile
``smollm2-airports`` was made; ``meft-plan --sparsity FILE`` takes the output as it is.
"""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path

import click
import torch

from meft.planner.models import load_model
from meft.planner.plan import Decision, Plan, Request
from meft.planner.profiles import LayerSparsity, SparsityProfile, load_gpu, load_host, load_link, load_sparsity
from meft.planner.search import Infeasible, ProfileSet, make_plan
from meft.runtime.data import Completion, Example, pad_token_id, tokenize_record
from meft.runtime.device import EmulatedDevice
from meft.runtime.embedded import SMOLLM2_PROFILE, airport_questions, smollm2_folder
from meft.runtime.model_loading import load_frozen_model, load_tokenizer
from meft.runtime.session import open_session
from meft.runtime.training import Trainer, TrainingOptions

ADAPTER_WIDTH, TOP_K, BATCH_SIZE, SEQ_LEN, FACTS = 2048, 32, 4, 64, 200


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--steps", type=click.IntRange(min=2), default=30, help="For depth 0; deeper ones take a third.")
@click.option("--depths", type=click.IntRange(0, 8), default=3, help="The deepest look-ahead to measure.")
@click.option("--learning-rate", type=float, default=2e-3)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Where to write the profile [default: stdout].")
def main(steps: int, depths: int, learning_rate: float, output: Path | None) -> None:
    """Measure and fit."""
    examples = _examples()
    recalls = [1.0]
    exact = _train(examples, depth=0, steps=steps, learning_rate=learning_rate)
    for depth in range(1, depths + 1):
        trainer = _train(examples, depth=depth, steps=max(2, steps // 3), learning_rate=learning_rate)
        recalls.append(round(trainer.measure_recall(), 4))
        click.echo(f"depth {depth}: recall {recalls[-1]:.3f}", err=True)
    profile = _profile(exact, recalls)
    text = json.dumps(profile.model_dump(mode="json"), indent=2) + "\n"
    if output is None:
        click.echo(text, nl=False)
    else:
        output.write_text(text)


def _profile(trainer: Trainer, recalls: list[float]) -> SparsityProfile:
    per_layer = list(zip(*trainer.measured.active_rows, strict=True))
    means = [statistics.fmean(rows) for rows in per_layer]
    filled = trainer.measured.tokens / (trainer.measured.steps * BATCH_SIZE * SEQ_LEN)
    spread = max(max(rows) / mean for rows, mean in zip(per_layer, means, strict=True)) - 1
    return SparsityProfile(
        key="smollm2-airports",
        name="SmolLM2-135M with MEFT on airport facts",
        basis="measured",
        source=(
            f"benchmarks/smollm2_sparsity.py: {trainer.measured.steps} training steps of SmolLM2-135M-Instruct on "
            f"{FACTS} airport facts, R = {ADAPTER_WIDTH}, K = {TOP_K}, {BATCH_SIZE} x {SEQ_LEN} positions of which "
            f"{filled:.0%} hold tokens, key-experts, keys at their random start; recall by depth from one probe each"
        ),
        layers=tuple(LayerSparsity(alpha=round(_alpha(mean), 4)) for mean in means),
        spread_fraction=round(min(1.0, spread), 3),
        prefetch_recall_by_depth=tuple(recalls),
    )


def _alpha(active_rows: float) -> float:
    """The exponent that gives ``active_rows`` of the union law."""
    picks = math.log1p(-min(active_rows / ADAPTER_WIDTH, 0.9999)) / math.log1p(-TOP_K / ADAPTER_WIDTH)
    return math.log(picks) / math.log(BATCH_SIZE * SEQ_LEN)


def _train(examples: list[Example], *, depth: int, steps: int, learning_rate: float) -> Trainer:
    folder = smollm2_folder()
    plan = _plan(depth)
    torch.manual_seed(0)
    device = EmulatedDevice(8 << 30)
    session = open_session(plan, load_frozen_model(plan, folder), device, seed=0)
    options = TrainingOptions(steps=steps, learning_rate=learning_rate, warmup_fraction=0.05)
    trainer = Trainer(session, examples, options, pad_id=pad_token_id(load_tokenizer(folder)), meft_version="benchmark")
    trainer.on_step = lambda step: click.echo(f"depth {depth}: step {step.step}, loss {step.loss:.3f}", err=True)
    trainer.run()
    return trainer


def _plan(depth: int) -> Plan:
    shape, _, _ = load_model(SMOLLM2_PROFILE)
    emulated = "emulated"
    request = Request(
        model=shape,
        gpu=emulated,
        host=emulated,
        link=emulated,
        sparsity="meft-paper",
        gpu_mem_bytes=8 << 30,
        host_mem_bytes=8 << 30,
        host_mem_basis="given",
        batch_size=BATCH_SIZE,
        seq_len=SEQ_LEN,
        grad_accum=1,
        weights_dtype="fp32",
        adapter_dtype="fp32",
        adapter_width=ADAPTER_WIDTH,
        top_k=TOP_K,
        prefetch_depth=depth,
        routing="key-experts",
        max_slowdown=100.0,
    )
    profiles = ProfileSet(
        gpu=load_gpu(emulated), link=load_link(emulated), host=load_host(emulated), sparsity=load_sparsity("meft-paper")
    )
    plan = make_plan(request, profiles, meft_version="benchmark")
    if isinstance(plan, Infeasible):
        raise click.ClickException(plan.message)
    uncapped = plan.decision.model_dump() | {"active_rows_cap": ADAPTER_WIDTH}
    return plan.model_copy(update={"decision": Decision.model_validate(uncapped)})


def _examples() -> list[Example]:
    tokenizer = load_tokenizer(smollm2_folder())
    facts = (Completion(fact["prompt"], fact["completion"]) for fact in airport_questions(FACTS))
    return [example for fact in facts for example in tokenize_record(fact, tokenizer)]


if __name__ == "__main__":
    main()
