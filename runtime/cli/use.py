"""``meft-run evaluate`` and ``generate``: score a model, and ask it."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from meft.planner.base.errors import UsageError
from meft.planner.base.files import write_atomic
from meft.planner.base.kinds import ADAPTER, refuse_other_path
from meft.planner.base.units import format_seconds
from meft.runtime.data.metrics import METRICS, evaluation_line

if TYPE_CHECKING:  # torch is loaded only once there is something to do
    from torch import nn

ADAPTER_FOLDER = "adapter"
"""Of a run's output folder, where its trained adapter is."""
ADAPTER_CONFIGS = ("meft_config.json", "adapter_config.json", "meft_method.json")
"""What an adapter's folder has: MEFT's, that of older versions and of peft, and that of methods peft has not."""
_PATH = click.Path(path_type=Path)
_COUNT = click.IntRange(min=1)
_ROWS_PER_TOKEN = click.option(
    "--rows-per-token",
    type=_COUNT,
    help="Rows of the adapter that a token meets, its best; fewer leave more of the base model.  [default: as trained]",
)
_MIN_SCORE = click.option(
    "--min-score",
    type=click.FloatRange(min=0),
    help="A token meets no row that it scores lower; higher leaves more of the base model.  [default: 0]",
)


def evaluation_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """How a task is asked: the options that running a plan and ``evaluate`` share."""
    options = (
        click.option("--metric", type=click.Choice(METRICS), help="[default: what the format is scored by, else em]"),
        click.option("--eval-limit", "limit", type=_COUNT, help="The first so many items only."),
        click.option("--eval-batch-size", "batch_size", type=_COUNT, default=8, show_default=True),
        click.option("--max-new-tokens", type=_COUNT, default=32, show_default=True, help="Of each answer."),
        _ROWS_PER_TOKEN,
        _MIN_SCORE,
    )
    for option in reversed(options):
        function = option(function)
    return function


def _model_options(function: Callable[..., Any]) -> Callable[..., Any]:
    options = (
        click.option("--model", type=_PATH, help="Folder of the base model [default: the embedded SmolLM2-135M]."),
        click.option(
            "--adapter", type=_PATH, help="Folder of a trained adapter, or of its run [default: the base alone]."
        ),
        click.option("--device", type=click.Choice(["cpu", "cuda"]), help="[default: cuda where there is one]"),
        click.option("--raw", is_flag=True, help="The prompt as it stands, without the chat template."),
    )
    for option in reversed(options):
        function = option(function)
    return function


@click.command("evaluate", short_help="Score a model, with or without an adapter, on a task.")
@click.argument("task")
@_model_options
@evaluation_options
@click.option("--show", type=click.IntRange(min=0), default=0, help="Print so many questions and answers.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Order of a named task's items.")
@click.option("-o", "--output", type=_PATH, help="Write the scores there as JSON.")
def evaluate_command(
    task: str,
    model: Path | None,
    adapter: Path | None,
    device: str | None,
    raw: bool,
    output: Path | None,
    **given: Any,
) -> None:
    """Ask every question of TASK and score the greedy answers; nothing is trained.

    TASK is a file of questions and answers in any format that --data reads (docs/data.md), or a name: airports,
    factbook, capitals, elements, bfcl, gsm-symbolic.
    """
    from meft.runtime.methods.generating import generator_of
    from meft.runtime.session.model_loading import load_tokenizer
    from meft.runtime.use.evaluation import EvaluationOptions, make_evaluator

    show, seed = given.pop("show"), given.pop("seed")
    folder = base_folder(model)
    evaluator = make_evaluator(EvaluationOptions(task, **given), load_tokenizer(folder), raw=raw, seed=seed)
    answered: list[tuple[str, str]] = []
    evaluator = evaluator.listening(lambda prompt, answer: answered.append((prompt, answer)))
    rows = {name: given[name] for name in ("rows_per_token", "min_score")}
    generator = generator_of(_model(folder, adapter, device, rows))
    result = evaluator.evaluate(generator, optimizer_steps=0)
    for prompt, answer in answered[:show]:
        click.echo(f"? {prompt}\n> {answer.strip()}")
    click.echo(f"{evaluation_line(result)}, {format_seconds(result.seconds)}")
    if output is not None:
        write_atomic(output, json.dumps(result.model_dump(mode="json"), indent=2) + "\n")


@click.command("generate", short_help="Ask a model: prompt in, text out.")
@click.argument("prompt", required=False)
@_model_options
@click.option("--max-new-tokens", type=_COUNT, default=64, show_default=True)
@_ROWS_PER_TOKEN
@_MIN_SCORE
def generate_command(
    prompt: str | None,
    model: Path | None,
    adapter: Path | None,
    device: str | None,
    raw: bool,
    max_new_tokens: int,
    **rows: Any,
) -> None:
    """Continue PROMPT greedily; without it, each line of standard input is a prompt and each answer one line."""
    from meft.runtime.methods.generating import generator_of
    from meft.runtime.session.model_loading import load_tokenizer
    from meft.runtime.use.generation import GenerationOptions, answers

    prompts = [prompt] if prompt is not None else [line for line in sys.stdin.read().splitlines() if line.strip()]
    if not prompts:
        raise UsageError("PROMPT: nothing to answer; give a prompt, or lines on standard input")
    folder = base_folder(model)
    tokenizer = load_tokenizer(folder)
    generator = generator_of(_model(folder, adapter, device, rows))
    said = answers(generator, tokenizer, prompts, GenerationOptions(max_new_tokens=max_new_tokens, raw=raw))
    for answer in said:
        click.echo(answer if prompt is not None else " ".join(answer.split()))


def base_folder(model: Path | None) -> Path:
    """The folder of a model that was given, or of the one that comes with the tools."""
    if model is None:
        from meft.runtime.data.embedded import smollm2_folder

        return smollm2_folder(lambda text: click.echo(text, err=True))
    from meft.runtime.session.model_loading import existing_folder

    return existing_folder(model)


def adapter_folder(given: Path) -> Path:
    """The folder of an adapter: itself, or the one in a run's output folder."""
    for folder in (given, given / ADAPTER_FOLDER):
        if any((folder / name).is_file() for name in ADAPTER_CONFIGS):
            return folder
    if not given.exists():
        raise UsageError(f"--adapter {given}: no such folder; give the one that meft-run wrote, such as output/adapter")
    refuse_other_path(given, wanted=ADAPTER)
    raise UsageError(f"--adapter {given}: no adapter; give the folder that meft-run wrote, such as output/adapter")


def placed_on(device: str | None) -> str:
    """The device that was asked for, or cuda where there is one; raises :class:`UsageError` where it is not there."""
    import torch

    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise UsageError("--device cuda: torch sees no CUDA device here; leave --device out")
    return device or ("cuda" if available else "cpu")


def _model(folder: Path, adapter: Path | None, device: str | None, rows: dict[str, Any]) -> nn.Module:
    """The base model on its device, with the adapter beside it if there is one, of which a token meets ``rows``."""
    from meft.runtime.methods.saving import holds_method, load_method
    from meft.runtime.use.adapter_model import AdapterModel
    from meft.runtime.use.saved import load_base

    for name, value in rows.items():
        if adapter is None and value is not None:
            raise UsageError(f"--{name.replace('_', '-')} {value}: there is no adapter; say which with --adapter")
    place, where = placed_on(device), None if adapter is None else adapter_folder(adapter)
    base = load_base(folder)
    placed: nn.Module = base
    if where is not None and holds_method(where):
        for name, value in rows.items():
            if value is not None:
                raise UsageError(f"--{name.replace('_', '-')} {value}: chooses rows of a MEFT adapter; this is none")
        placed = load_method(base, where)
    elif where is not None:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            placed = AdapterModel.from_pretrained(base, where, **rows)
        for warning in caught:
            if warning.category is UserWarning:
                click.echo(f"note: {warning.message}", err=True)
    return placed.to(place).eval()
