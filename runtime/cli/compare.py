"""``meft-run compare``: each method that fits a budget, trained and scored on the same data."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from meft.planner.base.errors import InfeasibleError, MeftError, UntraceableError, UsageError
from meft.planner.base.files import write_atomic
from meft.planner.base.units import format_bytes, parse_bytes
from meft.runtime.cli.baseline import USUAL_RANK, USUAL_REDUCTION, setup_of
from meft.runtime.cli.use import base_folder
from meft.runtime.data.metrics import METRICS

if TYPE_CHECKING:  # torch is loaded only once there is something to run
    from meft.runtime.data.examples import Example
    from meft.runtime.methods.compare import Candidate, Workload

_PATH = click.Path(path_type=Path)
_COUNT = click.IntRange(min=1)
DEFAULT_METHODS = (
    "none", "meft", "lora", "qlora", "parallel-adapter", "lst", "peft:dora", "peft:ia3", "peft:prompt-tuning",
    "peft:prefix-tuning", "peft:ln-tuning", "full",
)  # fmt: skip
RATES: dict[str, tuple[float, ...]] = {
    "none": (0.0,),
    "meft": (4e-3, 8e-3),
    "meft:": (8e-3,),
    "lora": (1e-3, 3e-3),
    "qlora": (1e-3, 3e-3),
    "parallel-adapter": (4e-3, 8e-3),
    "lst": (3e-3, 1e-2),
    "full": (1e-4, 3e-4),
    "bitfit": (1e-3, 3e-3),
    "peft:dora": (1e-3, 3e-3),
    "peft:ia3": (1e-2, 3e-2),
    "peft:prompt-tuning": (3e-2, 1e-1),
    "peft:prefix-tuning": (1e-2, 3e-2),
    "peft:ln-tuning": (3e-3, 1e-2),
}
"""The grid; any other method has that of lora, and a variant of meft the rate at which meft learnt best (airports,
SmolLM2-135M: benchmarks/knowledge_results.jsonl)."""
ARGUMENTS: dict[str, tuple[str, ...]] = {
    "peft:prompt-tuning": ("num_virtual_tokens=20",),
    "peft:prefix-tuning": ("num_virtual_tokens=20",),
    "peft:p-tuning": ("num_virtual_tokens=20",),
}
"""What a type cannot do without, as people give it."""
TRAINS_THE_MODEL = ("full", "bitfit", "peft:ln-tuning")
"""Methods whose parameters are the model's own: in bf16 an update of a 1,000th of a weight would be rounded away."""
MEFT_PREFIX = "meft:"
RESULTS, TABLE, FIGURE = "results.jsonl", "table.md", "figure.png"


@click.command("compare", short_help="Train every method that fits a budget, and put them side by side.")
@click.option("--model", type=_PATH, help="Folder of the model [default: the embedded SmolLM2-135M].")
@click.option("--data", type=_PATH, multiple=True, required=True, help="What to learn, as for training.")
@click.option("--eval", "task", metavar="FILE|NAME", required=True, help="What to score on: see meft-run evaluate.")
@click.option("--gpu-mem", required=True, help="The budget of the emulated device, e.g. 1GiB.")
@click.option(
    "--methods",
    default=",".join(DEFAULT_METHODS),
    show_default=True,
    help="peft:TYPE for any of peft's; meft:OPTION=VALUE:... for a plan's options, as in meft:routing=centroid, or "
    "meft:model=DIR for another base.",
)
@click.option("--seeds", type=_COUNT, default=1, show_default=True, help="So many; the grid is run with the first.")
@click.option("--learning-rates", metavar="A,B", help="Instead of each method's own grid (docs/methods.md).")
@click.option("--epochs", type=click.FloatRange(min=0, min_open=True), default=6.0, show_default=True)
@click.option("--batch-size", type=_COUNT, default=16, show_default=True)
@click.option("--seq-len", type=click.IntRange(min=2), default=32, show_default=True)
@click.option("--rank", type=_COUNT, help="Of lora and qlora.  [default: 16]")
@click.option(
    "--weights-dtype",
    type=click.Choice(["fp32", "bf16"]),
    default="fp32",
    show_default=True,
    help="Of the frozen model; what trains the model's own weights has them in fp32.",
)
@click.option(
    "--attention",
    type=click.Choice(["sdpa", "eager"]),
    default="sdpa",
    show_default=True,
    help="Of short texts in bf16 eager is the faster on a CPU.",
)
@click.option("--adapter-width", type=_COUNT, default=64, show_default=True, help="Of parallel-adapter.")
@click.option("--meft-width", type=_COUNT, default=1024, show_default=True, help="Of meft, with K 32 and all its rows.")
@click.option("--prose", type=_PATH, help="Ordinary text whose loss shows forgetting.")
@click.option("--raw", is_flag=True, help="Join prompt and completion as they stand, without the chat template.")
@click.option("--metric", type=click.Choice(METRICS), help="[default: what the format is scored by, else em]")
@click.option("--eval-limit", type=_COUNT, help="The first so many items only.")
@click.option("--max-new-tokens", type=_COUNT, default=16, show_default=True, help="Of each answer.")
@click.option("--output-dir", type=_PATH, default=Path("compare"), show_default=True)
def compare_command(data: tuple[Path, ...], task: str, gpu_mem: str, methods: str, **given: Any) -> None:
    """Train each of --methods at the best of a small grid of learning rates, and write one table and one figure.

    Runs are lines of results.jsonl in --output-dir, appended as they end; started again it goes on. What the planner
    says does not fit is not run. Everything runs on the emulated device.
    """
    from meft.runtime.methods.compare import compare, markdown, rows_of
    from meft.runtime.methods.compare_figure import draw

    folder, output = base_folder(given.pop("model")), given.pop("output_dir")
    budget = parse_bytes(gpu_mem, field="--gpu-mem")
    names = [name.strip() for name in methods.split(",") if name.strip()]
    seeds = range(given.pop("seeds"))
    work = _workload(folder, data, task, budget, given)
    candidates = [_candidate(name, folder, budget, given) for name in dict.fromkeys(names)]
    output.mkdir(parents=True, exist_ok=True)
    compare(candidates, work, seeds, output / RESULTS, say=lambda text: click.echo(f"meft-run: {text}", err=True))
    rows = rows_of(candidates, work, seeds, output / RESULTS)
    write_atomic(output / TABLE, markdown(rows))
    draw(rows, output / FIGURE, metric=work.evaluator.task.metric)
    click.echo(markdown(rows), nl=False)
    click.echo(f"wrote {output / RESULTS}, {output / TABLE} and {output / FIGURE}")


def _workload(folder: Path, data: tuple[Path, ...], task: str, budget: int, given: dict[str, Any]) -> Workload:
    from meft.runtime.data.loading import DataOptions, load_dataset
    from meft.runtime.methods.compare import PROSE_TOKENS, Workload
    from meft.runtime.session.model_loading import load_tokenizer
    from meft.runtime.training.options import Length
    from meft.runtime.training.training import digest_of
    from meft.runtime.use.evaluation import EvaluationOptions, make_evaluator

    tokenizer, raw = load_tokenizer(folder), given["raw"]
    reading = DataOptions(raw=raw)
    dataset = load_dataset(data, tokenizer, seq_len=given["seq_len"], options=reading, show=0)
    options = EvaluationOptions(
        task,
        metric=given.pop("metric"),
        limit=given.pop("eval_limit"),
        batch_size=2 * given["batch_size"],
        max_new_tokens=given.pop("max_new_tokens"),
    )
    prose_file = given.pop("prose")
    prose: tuple[Example, ...] = ()
    if prose_file is not None:
        prose = load_dataset(
            prose_file, tokenizer, seq_len=PROSE_TOKENS, options=DataOptions(raw=True, allow_cut=True), show=0
        ).examples
    examples = dataset.examples
    length = Length(epochs=given["epochs"])
    steps = length.total_steps(num_examples=len(examples), batch_size=given["batch_size"], before=None)
    evaluator = make_evaluator(options, tokenizer, raw=raw)
    asked = (evaluator.task.items, replace(options, task=evaluator.task.metric))  # wherever the file lies
    said = f"{digest_of(examples)} {digest_of(prose)} {asked} {steps} {given['batch_size']}"
    return Workload(
        model=folder,
        examples=examples,
        evaluator=evaluator,
        prose=prose,
        tokenizer=tokenizer,
        steps=steps,
        budget_bytes=budget,
        digest=hashlib.sha256(said.encode()).hexdigest()[:16],
    )


def _candidate(name: str, folder: Path, budget: int, given: dict[str, Any]) -> Candidate:
    """A method with its size, its grid and what it will take, or the reason why it is not run."""
    from meft.runtime.methods.compare import Candidate

    rates = RATES.get(MEFT_PREFIX if name.startswith(MEFT_PREFIX) else name, RATES["lora"])
    if given["learning_rates"] is not None and name != "none":
        rates = _rates(given["learning_rates"])
    if name == "meft" or name.startswith(MEFT_PREFIX):
        return _meft_candidate(name, folder, budget, given, rates)
    try:
        setup = _setup(name, folder, given)
        if name == "none":
            return Candidate(name, "-", rates, setup)
        predicted, fits = _predicted(name, folder, budget, given)
    except MeftError as error:
        return Candidate(name, "-", refused=str(error))
    size = _size(name, given)
    if not fits:
        needed = format_bytes(predicted or 0)
        return Candidate(name, size, refused=f"does not fit: {needed} allocated, of {format_bytes(budget)}")
    return Candidate(name, size, rates, setup, predicted_bytes=predicted)


def _rates(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"--learning-rates {text}: give numbers with commas between them") from None


def _setup(name: str, folder: Path, given: dict[str, Any]) -> Any:
    lora = name in ("lora", "qlora")
    options: dict[str, Any] = {
        "method": "parallel-adapter" if name == "none" else name,
        "peft_arguments": ARGUMENTS.get(name, ()),
        "peft_config": None,
        "rank": given["rank"] if lora else None,
        "target_modules": None,
        "adapter_width": given["adapter_width"] if name == "parallel-adapter" else None,
        "reduction": None,
        "dropped_layers": None,
        "weights_dtype": _weights_dtype(name, given),
        "attention": given["attention"],
        "activation_checkpointing": False,
        "batch_size": given["batch_size"],
        "seq_len": given["seq_len"],
        "grad_accum": 1,
    }
    return setup_of(options, folder, emulated=True)


def _weights_dtype(name: str, given: dict[str, Any]) -> str:
    """Of a method's frozen model, or of the model that it trains."""
    if name == "qlora":
        return "nf4"
    return "fp32" if name in TRAINS_THE_MODEL else given["weights_dtype"]


def _predicted(name: str, folder: Path, budget: int, given: dict[str, Any]) -> tuple[int | None, bool]:
    """The allocated peak and whether the method fits, by its closed form or the trace of its code; of what cannot be
    traced nothing, and the run itself will tell."""
    import meft

    options: dict[str, Any] = {key: given[key] for key in ("attention", "batch_size", "seq_len")}
    options |= {"weights_dtype": _weights_dtype(name, given)}
    if name in ("lora", "qlora"):
        options |= {"rank": given["rank"] or USUAL_RANK, "target_modules": "all-linear"}
    if name == "parallel-adapter":
        options |= {"adapter_width": given["adapter_width"]}
    if name in ARGUMENTS:
        options |= {"peft_arg": ARGUMENTS[name]}
    try:
        estimate = meft.estimate(
            name, model=folder, gpu="emulated", gpu_mem=budget, activation_checkpointing=False, **options
        )
    except UntraceableError:
        return None, True
    return estimate.peak_allocated_bytes, estimate.fits


def _size(name: str, given: dict[str, Any]) -> str:
    if name in ("lora", "qlora"):
        return f"rank {given['rank'] or 16}"
    if name == "lst":
        return f"D / {USUAL_REDUCTION}"
    if name == "parallel-adapter":
        return f"width {given['adapter_width']}"
    return ", ".join(ARGUMENTS.get(name, ("-",))).replace("num_virtual_tokens=", "virtual tokens ")


def _meft_candidate(name: str, folder: Path, budget: int, given: dict[str, Any], rates: tuple[float, ...]) -> Candidate:
    import meft
    from meft.runtime.methods.compare import Candidate

    said = _plan_options(name)
    folder = Path(said.pop("model", folder))
    options: dict[str, Any] = {
        "model": folder,
        "gpu": "emulated",
        "gpu_mem": budget,
        "batch_size": given["batch_size"],
        "seq_len": given["seq_len"],
        "grad_accum": 1,
        "adapter_width": given["meft_width"],
        "top_k": min(32, given["meft_width"]),
        "routing": "exact",
        "weights_dtype": given["weights_dtype"],
        "attention": given["attention"],
        "max_slowdown": 1000.0,
        "min_trainable": 0.0,
    }
    try:
        plan = meft.plan(**options | said)
    except (InfeasibleError, UsageError) as error:
        return Candidate(name, f"width {given['meft_width']:,}", refused=str(error))
    size = f"width {plan.decision.adapter_width:,}, K {plan.decision.top_k}"
    peak = plan.prediction.device_memory.peak_allocated_bytes
    return Candidate(name, size, rates, plan=plan, predicted_bytes=peak, model=folder)


def _plan_options(name: str) -> dict[str, Any]:
    """What follows ``meft:``, options of a plan with colons between them.

    Raises:
        UsageError: one without a value.
    """
    found: dict[str, Any] = {}
    for part in name.removeprefix("meft").removeprefix(":").split(":"):
        option, equals, value = part.partition("=")
        if part and not (equals and value):
            raise UsageError(f"--methods {name}: {part}: is no OPTION=VALUE, as in meft:routing=centroid")
        if part:
            found[option.replace("-", "_")] = int(value) if value.isdecimal() else value
    return found
