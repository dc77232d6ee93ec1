"""Does it learn? SmolLM2-135M with a MEFT adapter on airport facts that it does not know, before and after.

    python benchmarks/learning.py [--facts 200] [--epochs 8] [--json FILE]

Plans with the planner, trains on the emulated device through the same session that ``meft-run`` uses, and answers the
training questions greedily. *Contains* is exact match as the MEFT paper counts it (the gold answer appears in the
output); *strict* wants the output to be the answer. This measures memorisation of the facts it was trained on, which
is what knowledge injection is.
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path
from typing import Any

import click
import torch

from meft.planner.models import load_model
from meft.planner.plan import Plan, Request
from meft.planner.profiles import load_gpu, load_host, load_link, load_sparsity
from meft.planner.search import Infeasible, ProfileSet, make_plan
from meft.runtime.data import Completion, Example, pad_token_id, tokenize_record
from meft.runtime.device import EmulatedDevice
from meft.runtime.embedded import SMOLLM2_PROFILE, airport_questions, smollm2_folder
from meft.runtime.model_loading import load_frozen_model, load_tokenizer
from meft.runtime.session import Session, open_session
from meft.runtime.training import Progress, Trainer, TrainingOptions

BATCH_SIZE, SEQ_LEN, MAX_NEW_TOKENS, ANSWER_BATCH = 8, 64, 16, 20


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--facts", type=click.IntRange(min=1), default=200)
@click.option("--epochs", type=click.IntRange(min=1), default=8)
@click.option("--learning-rate", type=float, default=2e-3)
@click.option("--gpu-mem-mib", type=int, default=1536, help="Device budget in MiB.")
@click.option("--top-k", type=int, default=32)
@click.option("--seed", type=int, default=0)
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the result there too.")
def main(
    facts: int, epochs: int, learning_rate: float, gpu_mem_mib: int, top_k: int, seed: int, json_path: Path | None
) -> None:
    """Train and ask."""
    folder = smollm2_folder(click.echo)
    plan = _plan(gpu_mem_mib << 20, top_k)
    questions = airport_questions(facts, seed=seed)
    tokenizer = load_tokenizer(folder)
    device = EmulatedDevice(plan.prediction.device_memory.allocator_budget_bytes)
    torch.manual_seed(seed)
    session = open_session(plan, load_frozen_model(plan, folder), device, seed=seed)
    before = _ask(session, tokenizer, questions)
    click.echo(f"before: {before}")
    started = time.monotonic()
    trainer = _train(session, tokenizer, questions, epochs, learning_rate, seed)
    seconds = time.monotonic() - started
    after = _ask(session, tokenizer, questions)
    losses = trainer.history.losses
    per_epoch = max(1, len(losses) // epochs)
    result = {
        "model": "SmolLM2-135M-Instruct, fp32, emulated device",
        "facts": facts,
        "decision": plan.decision.model_dump(),
        "steps": len(losses),
        "batch": [BATCH_SIZE, SEQ_LEN],
        "learning_rate": learning_rate,
        "seed": seed,
        "before": before,
        "after": after,
        "loss_per_epoch": [
            round(statistics.fmean(losses[start : start + per_epoch]), 4) for start in range(0, len(losses), per_epoch)
        ],
        "peak_allocated_bytes": trainer.measured.peaks.allocated_bytes,
        "training_seconds": round(seconds, 1),
        "torch_threads": torch.get_num_threads(),
    }
    click.echo(json.dumps(result, indent=2))
    if json_path is not None:
        json_path.write_text(json.dumps(result, indent=2) + "\n")


def _plan(gpu_mem_bytes: int, top_k: int) -> Plan:
    shape, _, _ = load_model(SMOLLM2_PROFILE)
    request = Request(
        model=shape,
        gpu="emulated",
        host="emulated",
        link="emulated",
        sparsity="meft-paper",
        gpu_mem_bytes=gpu_mem_bytes,
        host_mem_bytes=8 << 30,
        host_mem_basis="given",
        batch_size=BATCH_SIZE,
        seq_len=SEQ_LEN,
        grad_accum=1,
        weights_dtype="fp32",
        adapter_dtype="fp32",
        top_k=top_k,
        adapter_width=1024,
    )
    profiles = ProfileSet(
        gpu=load_gpu("emulated"),
        link=load_link("emulated"),
        host=load_host("emulated"),
        sparsity=load_sparsity("meft-paper"),
    )
    plan = make_plan(request, profiles, meft_version="benchmark")
    if isinstance(plan, Infeasible):
        raise click.ClickException(plan.message)
    return plan


def _train(
    session: Session, tokenizer: Any, questions: list[dict[str, str]], epochs: int, learning_rate: float, seed: int
) -> Trainer:
    examples: list[Example] = []
    for question in questions:
        examples += tokenize_record(Completion(question["prompt"], question["completion"]), tokenizer)
    steps = epochs * -(-len(examples) // BATCH_SIZE)
    options = TrainingOptions(steps=steps, learning_rate=learning_rate, warmup_fraction=0.05, seed=seed)
    trainer = Trainer(session, examples, options, pad_id=pad_token_id(tokenizer), meft_version="benchmark")

    def on_step(progress: Progress) -> None:
        if progress.step % 10 == 0:
            click.echo(f"step {progress.step}/{steps} loss {statistics.fmean(trainer.history.losses[-10:]):.3f}")

    trainer.on_step = on_step
    trainer.run()
    return trainer


def _ask(session: Session, tokenizer: Any, questions: list[dict[str, str]]) -> dict[str, float]:
    """Greedy answers to every question; fractions that contain, and that are, the gold answer."""
    tokenizer.padding_side = "left"
    session.model.eval()
    contains = strict = 0
    for first in range(0, len(questions), ANSWER_BATCH):
        some = questions[first : first + ANSWER_BATCH]
        for question, answer in zip(some, _answers(session, tokenizer, some), strict=True):
            gold, said = question["completion"].casefold().strip(), answer.casefold().strip()
            contains += gold in said
            strict += gold == said.rstrip(".")
    session.model.train()
    return {"contains": contains / len(questions), "strict": strict / len(questions)}


def _answers(session: Session, tokenizer: Any, questions: list[dict[str, str]]) -> list[str]:
    chats = [[{"role": "user", "content": question["prompt"]}] for question in questions]
    texts = [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]
    inputs = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
    books = session.device.books  # type: ignore[attr-defined]
    books.adopt(inputs["input_ids"])
    books.adopt(inputs["attention_mask"])
    with session.device.scope(), torch.no_grad():
        generated = session.model.generate(  # type: ignore[operator]
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=MAX_NEW_TOKENS,
            do_sample=False,
            pad_token_id=pad_token_id(tokenizer),
        )
        answers = generated[:, inputs["input_ids"].shape[1] :].tolist()
    return [tokenizer.decode(answer, skip_special_tokens=True) for answer in answers]


if __name__ == "__main__":
    main()
