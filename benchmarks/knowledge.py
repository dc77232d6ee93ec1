"""Which method stores knowledge? Airport facts (IATA code to city) into SmolLM2-135M, every method in the same books.

    python benchmarks/knowledge.py run --results knowledge.jsonl [--facts 500] [--seeds 0,1,2] [--max-runs N]
    python benchmarks/knowledge.py details --results details.jsonl
    python benchmarks/knowledge.py report --results knowledge.jsonl --json knowledge.json --figure knowledge.png

``run`` is made to be run in pieces: each run is one JSON line appended when it is done, and what the file holds already
is left out, so a killed benchmark goes on where it was. The full form takes hours on two cores; ``--quick`` takes about
a minute or two on SmolLM2 and shows that everything works, not which method is best. What is committed was made so,
in pieces: ``run --results benchmarks/knowledge_results.jsonl``, then ``report --results
benchmarks/knowledge_results.jsonl --facts 500 --figure docs/knowledge.png``.

Methods: ``meft``; ``parallel`` (dense adapter of the same width, all on the device); ``offload`` (the same, moved
whole: the runtime with K at the width); ``full`` fine-tuning; ``none``; and under the *budget*, which is the device
memory that meft's adapter and optimizer take: ``narrow`` (a dense adapter) and ``lora`` (peft, every linear layer),
each as large as the budget lets it be. ``--active-rows-cap`` gives meft smaller buffers, as a plan would, and so
all a smaller budget. ``lora-16`` is LoRA of the usual rank 16, whatever that needs.

Each method trains at every learning rate of its grid with the first seed, then at the best one with the other seeds.
Evaluation is :mod:`meft.runtime.use.evaluation`'s: greedy answers to the trained questions (that is what injecting
knowledge means), and forgetting: loss per token on factbook prose, and the capitals that the model still knows; for
meft also where a token meets its best rows alone, or all. Prompts are statements to complete ("Airport JFK is in"): the
question with the chat template would take five times the tokens, and of capitals asked for as a question this model
names none, as a statement every fourth. Memory is counted over the first steps, transfers over all: every step
allocates the same, and the books of the emulated device cost a third of the time.
"""

from __future__ import annotations

import json
import re
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch

from meft.planner.base.errors import DeviceOutOfMemory, Infeasible
from meft.planner.models.architecture import ModelShape
from meft.planner.models.configs import shape_from_config
from meft.planner.models.linears import linear_layers
from meft.planner.predict.prediction import ProfileSet
from meft.planner.records.plan import Plan, Request
from meft.planner.records.profile_catalogue import load_gpu, load_host, load_link, load_sparsity
from meft.planner.search.search import make_plan
from meft.runtime.data.embedded import smollm2_folder
from meft.runtime.data.examples import Batch, Example, pad_token_id, tokenize_record
from meft.runtime.data.records import Completion, Text
from meft.runtime.data.task_sources import factbook_prose, load_task
from meft.runtime.data.tasks import Item, Task
from meft.runtime.device.device import EmulatedDevice
from meft.runtime.methods.compare import close_books, trainable_of
from meft.runtime.session.baselines import STATES, TRAINED, BaselineSession, open_baseline
from meft.runtime.session.expert_load import expert_load
from meft.runtime.session.model_loading import load_frozen_model, load_tokenizer
from meft.runtime.session.session import Session, StepResult, WindowEnd, open_session
from meft.runtime.session.streamed import StreamedSession
from meft.runtime.training.training import Progress, Trainer, TrainingOptions
from meft.runtime.use.evaluation import Evaluator, mean_loss, session_loss
from meft.runtime.use.generation import GenerationOptions, ModelGenerator, SessionGenerator
from meft.runtime.use.inference import Serving

METHODS = ("none", "meft", "parallel", "offload", "narrow", "lora", "lora-16", "full")
LEARNING_RATES = {
    "none": (0.0,),
    "meft": (4e-3, 8e-3, 1.6e-2),
    "parallel": (4e-3, 8e-3),
    "offload": (8e-3,),
    "narrow": (1e-2, 2e-2, 4e-2, 8e-2),
    "lora": (3e-3, 5e-3, 1e-2, 2e-2),
    "lora-16": (1e-3, 3e-3),
    "full": (1e-4, 3e-4),
}
AIRPORTS = "Which city does the airport with IATA code {} serve?", "Airport {} is in"
CAPITALS = "What is the capital of {}?", "The capital of {} is"
"""A task's question, and the statement put in its place."""
COMPARED = ("facts", "epochs", "active_rows_cap", "tokens_see")
"""What runs must share to be compared; no cap is 0."""
USUAL = {"tokens_see": "union"}
"""What records from before there was a choice had."""
AMPLE_BYTES = 64 << 30
BOOKED_STEPS = 3
"""Two whole optimizer steps and the forward and backward after them."""
Rates = dict[str, tuple[float, ...]]
ADAPTER_CATEGORIES = (
    TRAINED,
    STATES,
    "row_staging",
    "row_gradients",
    "router_weights",
    "router_states",
    "row_indices",
    "kept_rows",
    "gradient_sums",
)


@dataclass(frozen=True)
class Run:
    """Everything that decides a run's result; two runs with the same are the same run."""

    method: str
    learning_rate: float
    seed: int
    facts: int
    epochs: int
    width: int = 1024
    top_k: int = 32
    num_experts: int = 1
    num_probes: int = 1
    rank: int = 16
    batch_size: int = 16
    seq_len: int = 11
    key_init: str = "random"
    clock: str = "row"
    """AdamW's step count: each ``row`` its own, or one ``global`` count."""
    catch_up: bool = False
    """Decay a row's moments for the steps that it missed."""
    warmup_fraction: float = 0.02
    max_norm: float | None = 1.0
    forgetting_texts: int = 16
    forgetting_items: int = 120
    active_rows_cap: int | None = None
    """Rows that meft's buffers on the device hold, which is what it needs there; without one ``width``, which drops
    none. With one the budget is smaller for all methods."""
    tokens_see: str = "union"
    """Which of meft's active rows a token's output uses: the ``union``, or its ``own`` best K."""

    @property
    def key(self) -> str:
        """Identifies the run in a results file. What is as in files from before there was a choice is left out."""
        fields = asdict(self)
        for name, usual in (("active_rows_cap", None), ("tokens_see", "union")):
            if fields[name] == usual:
                del fields[name]
        return json.dumps(fields, sort_keys=True)


# --- one run ---------------------------------------------------------------------------------------------------------


def perform(run: Run, folder: Path) -> dict[str, Any]:
    """Train and evaluate; returns the run and what it gave."""
    torch.manual_seed(run.seed)
    tokenizer = load_tokenizer(folder)
    plan = plan_of(run, shape_of(folder))
    task = airports(run, tokenizer)
    examples = [example for item in task.items for example in lines_of(item, tokenizer)]
    with closing(opened(run, plan, folder)) as session:
        started, cpu_started = time.monotonic(), time.process_time()
        trainer = _train(run, session, examples)
        seconds, cpu_seconds = time.monotonic() - started, time.process_time() - cpu_started
        return asdict(run) | {
            **_asked(run, session, tokenizer, task),
            "fewer_rows": _fewer_rows(run, session, tokenizer, task),
            "loss_per_epoch": _per_epoch(trainer, run),
            "training_seconds": round(seconds, 1),
            "training_cpu_seconds": round(cpu_seconds, 1),  # what sharing the machine does not change
            "torch_threads": torch.get_num_threads(),
            **books_of(session, trainer),
        }


def airports(run: Run, tokenizer: Any) -> Task:
    """The first facts that fit ``seq_len``, the same for every seed."""
    asked = load_task("airports", limit=2 * run.facts + 100).items
    fitting = [
        item
        for item in (_statement(each, *AIRPORTS) for each in asked)
        if all(len(example.input_ids) <= run.seq_len for example in lines_of(item, tokenizer))
    ]
    if len(fitting) < run.facts:
        raise click.ClickException(f"--seq-len {run.seq_len}: only {len(fitting)} of {len(asked)} facts are as short")
    return Task("airports", "em", tuple(fitting[: run.facts]))


def _statement(item: Item, question: str, statement: str) -> Item:
    """The same fact as a sentence to complete."""
    about = re.fullmatch(re.escape(question).replace(r"\{\}", "(.+)"), item.prompt)
    if about is None:
        raise ValueError(f"{item.prompt!r} does not ask {question!r}")
    return Item(statement.format(about[1]), f" {item.completion}", item.answers)


def lines_of(item: Item, tokenizer: Any) -> list[Example]:
    """A fact's examples: one."""
    return list(tokenize_record(Completion(item.prompt, item.completion), tokenizer, raw=True))


def shape_of(folder: Path) -> ModelShape:
    """Of the model in a folder."""
    return shape_from_config(json.loads((folder / "config.json").read_text()), name=folder.name)


def plan_of(run: Run, shape: ModelShape) -> Plan:
    """A plan of the run's decision; the planner supplies predictions and what the run leaves open."""
    top_k = run.width if run.method == "offload" else run.top_k
    request = Request(
        model=shape,
        gpu="emulated",
        host="emulated",
        link="emulated",
        sparsity="meft-paper",
        gpu_mem_bytes=AMPLE_BYTES,
        host_mem_bytes=16 << 30,
        host_mem_basis="given",
        batch_size=run.batch_size,
        seq_len=run.seq_len,
        grad_accum=1,
        weights_dtype="fp32",
        adapter_dtype="fp32",
        max_slowdown=1000.0,
        activation_checkpointing=False,
        adapter_width=run.width,
        top_k=top_k,
        prefetch_depth=0,
        routing="exact",
        rows_in_backward="refetched",
        tokens_see=run.tokens_see,  # type: ignore[arg-type]
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
    routing = "exact" if run.num_experts == 1 else "key-experts"
    experts = {"num_experts": run.num_experts, "num_probes": run.num_probes, "routing": routing}
    cap = max(top_k, min(run.active_rows_cap or run.width, run.width))
    plain = {"active_rows_cap": cap, "cached_rows": 0, "gradients_on_device": False, "bf16_copy": False}
    decision = plan.decision.model_copy(update=plain | experts)
    return plan.model_copy(update={"decision": type(decision).model_validate(decision.model_dump())})


def opened(run: Run, plan: Plan, folder: Path) -> Session | BaselineSession:
    """The run's method beside the model in a folder."""
    model, device = load_frozen_model(plan, folder), EmulatedDevice(AMPLE_BYTES)
    if run.method in ("meft", "offload"):
        session = open_session(plan, model, device, seed=run.seed, key_init=run.key_init)  # type: ignore[arg-type]
        _set_clock(session, run)
        return session
    names = {"parallel": "parallel-adapter", "narrow": "parallel-adapter", "lora-16": "lora"}
    name: Any = names.get(run.method, run.method)
    return open_baseline(name, plan, model, device, seed=run.seed, rank=run.rank)


def _set_clock(session: Session, run: Run) -> None:
    """Other semantics for rows that are rarely touched, to compare: put into the tables before each update."""
    if run.clock == "row" and not run.catch_up:
        return
    plain, done = session.optimizer_step, [0]
    last = [torch.zeros_like(tables.step_counts) for tables in session.store.layers]

    def step(**options: Any) -> Any:
        for tables, seen in zip(session.store.layers, last, strict=True):
            rows = tables.touched.nonzero().flatten()
            if run.catch_up:
                missed = (done[0] - seen[rows]).clamp(min=0).unsqueeze(1).float()
                tables.first_moment[rows] *= session.settings.beta1**missed
                tables.second_moment[rows] *= session.settings.beta2**missed
            if run.clock == "global":
                tables.step_counts[rows] = done[0]
            seen[rows] = done[0] + 1
        done[0] += 1
        return plain(**options)

    session.optimizer_step = step  # type: ignore[method-assign]
    micro_batch = session.step

    def untold(batch: Batch, *, loss_scale: float, window_end: WindowEnd | None = None) -> StepResult:
        del window_end  # told of it, backward would update rows before the step above has seen them
        return micro_batch(batch, loss_scale=loss_scale)

    session.step = untold  # type: ignore[method-assign]


def _train(run: Run, session: Any, examples: list[Example]) -> Trainer | None:
    if run.method == "none":
        return None
    steps = run.epochs * -(-len(examples) // run.batch_size)
    options = TrainingOptions(
        steps=steps,
        learning_rate=run.learning_rate,
        warmup_fraction=run.warmup_fraction,
        max_norm=run.max_norm,
        seed=run.seed,
    )
    close_books(session, after=BOOKED_STEPS)
    trainer = Trainer(
        session, examples, options, pad_id=0, meft_version="benchmark", on_step=partial(_tell, run, steps // run.epochs)
    )
    trainer.run()
    return trainer


def _tell(run: Run, steps_per_epoch: int, progress: Progress) -> None:
    epoch, within = divmod(progress.step, steps_per_epoch)
    if not within:
        name = f"{run.method} lr {run.learning_rate:.0e} seed {run.seed}"
        click.echo(f"  {name}: epoch {epoch} of {run.epochs}, loss {progress.loss:.3f}", err=True)


def _fewer_rows(run: Run, session: Any, tokenizer: Any, task: Task) -> dict[int, dict[str, Any]]:
    """Asked again with tokens meeting only their best rows, by how many: K, twice and four times as many, and all."""
    if not isinstance(session, Session) or run.method == "offload":
        return {}
    counts = (run.top_k, 2 * run.top_k, 4 * run.top_k, run.width)
    return {rows: _asked(run, session, tokenizer, task, rows) for rows in counts}


def _asked(run: Run, session: Any, tokenizer: Any, task: Task, rows_per_token: int | None = None) -> dict[str, Any]:
    return {
        "exact_match": _scores(session, tokenizer, task, run, rows_per_token),
        "forgetting": _forgetting(run, session, tokenizer, rows_per_token),
    }


def _scores(session: Any, tokenizer: Any, task: Task, run: Run, rows_per_token: int | None) -> dict[str, float]:
    evaluator = Evaluator(task, tokenizer, GenerationOptions(8, 2 * run.batch_size, raw=True))
    sparse = isinstance(session, Session)
    generator = SessionGenerator(session, Serving(rows_per_token)) if sparse else ModelGenerator(session.model)
    return evaluator.evaluate(generator, optimizer_steps=0).scores


def _forgetting(run: Run, session: Any, tokenizer: Any, rows_per_token: int | None) -> dict[str, float]:
    """What the model knew before: prose it could predict, capitals it could name."""
    texts = factbook_prose(run.forgetting_texts)
    examples = [each.truncated(64) for text in texts for each in tokenize_record(Text(text), tokenizer, raw=True)]
    sparse = isinstance(session, Session)
    batch_loss = partial(session_loss, session, how=Serving(rows_per_token)) if sparse else session.loss
    loss = mean_loss(batch_loss, examples, batch_size=4, seq_len=64, pad_id=pad_token_id(tokenizer))
    asked = capitals(run.forgetting_items)
    return {
        "prose_loss": loss,
        "capitals_exact_match": _scores(session, tokenizer, asked, run, rows_per_token)["exact_match"],
    }


def capitals(limit: int) -> Task:
    """Statements that the model completes before training, some of them."""
    asked = load_task("capitals", limit=limit).items
    return Task("capitals", "em", tuple(_statement(item, *CAPITALS) for item in asked))


def _per_epoch(trainer: Trainer | None, run: Run) -> list[float]:
    if trainer is None:
        return []
    losses = trainer.history.losses
    size = -(-len(losses) // run.epochs)
    return [round(statistics.fmean(losses[first : first + size]), 4) for first in range(0, len(losses), size)]


def books_of(session: Any, trainer: Trainer | None) -> dict[str, Any]:
    """Device peak, what of it the method takes beside the frozen model, and traffic per step."""
    if trainer is None:
        return {"trainable_parameters": 0, "peak_allocated_bytes": 0, "peak_reserved_bytes": 0,
                "method_bytes": 0, "h2d_bytes_per_step": 0, "d2h_bytes_per_step": 0}  # fmt: skip
    measured, engine = trainer.measured, session.engine
    steps = measured.steps
    live, at_peak = dict(session.device.books._bytes_by_category), measured.peaks.by_category
    on_device = isinstance(session, BaselineSession) and not isinstance(session, StreamedSession)
    gradients = 4 * session.trainable_parameters if on_device else 0
    found: dict[str, Any] = {
        "trainable_parameters": trainable_of(session),
        "peak_allocated_bytes": measured.peaks.allocated_bytes,
        "peak_reserved_bytes": measured.peaks.reserved_bytes,
        "method_bytes": sum(max(live.get(name, 0), at_peak.get(name, 0)) for name in ADAPTER_CATEGORIES) + gradients,
        "h2d_bytes_per_step": engine.bytes_in("h2d", "step") // steps,
        "d2h_bytes_per_step": engine.bytes_in("d2h", "step") // steps,
    }
    if isinstance(session, Session):
        loads = expert_load(session)
        found["dropped_rows"] = measured.dropped_rows
        layers = measured.active_rows.layers
        found["active_rows_mean"] = statistics.fmean(count for layer in layers for count in layer.elements())
        found["dead_experts"] = sum(load.dead_experts for load in loads)
        found["dead_rows"] = sum(load.dead_rows for load in loads)
        found["busiest_share"] = max(load.busiest_share for load in loads)
    return found


# --- many runs -------------------------------------------------------------------------------------------------------


def first_stage(methods: tuple[str, ...], seed: int, base: Run, rates: Rates, shape: ModelShape) -> list[Run]:
    """Every method at every learning rate of its grid, with one seed."""
    return [
        replace(base, method=method, seed=seed, learning_rate=rate, **_size(method, base, shape))
        for method in methods
        for rate in rates[method]
    ]


def second_stage(first: list[Run], records: list[dict[str, Any]], seeds: tuple[int, ...]) -> list[Run]:
    """Each method's best of the first stage with other seeds, seed by seed, so that a part is a comparison already.

    A method whose grid is not done yet is left out.
    """
    done = {record["key"]: record for record in records}
    of_method: defaultdict[str, list[Run]] = defaultdict(list)
    for run in first:
        of_method[run.method].append(run)
    whole = [runs for runs in of_method.values() if all(run.key in done for run in runs)]
    best = [max(runs, key=lambda run: _exact_match(done[run.key])) for runs in whole]
    return [replace(run, seed=seed) for seed in seeds for run in best]


def _exact_match(record: dict[str, Any]) -> float:
    return -1.0 if "out_of_memory" in record else float(record["exact_match"]["exact_match"])


def _size(method: str, base: Run, shape: ModelShape) -> dict[str, int]:
    """What makes ``narrow`` and ``lora`` as large as the budget lets them be: fp32 weight, gradient and two moments."""
    budget = budget_bytes(base.active_rows_cap or base.width, shape.hidden_size)
    if method == "narrow":
        width = max(1, budget // (16 * 2 * shape.hidden_size * shape.num_layers))
        return {"width": width, "top_k": min(base.top_k, width)}  # a plan's K is at most its width
    if method == "lora":
        per_rank = sum(layer.inputs + layer.outputs for layer in linear_layers(shape)) * shape.num_layers
        return {"rank": max(1, round(budget / (16 * per_rank)))}  # nearest: ranks are coarse
    return {}


def budget_bytes(rows: int, hidden_size: int) -> int:
    """What meft needs on the device at most: two fp32 buffers of so many rows, for all layers together."""
    return 2 * rows * 2 * hidden_size * 4


def details(base: Run) -> Iterator[Run]:
    """One thing changed at a time, beside the base."""
    changes: list[dict[str, Any]] = [
        {},
        {"key_init": "ffn"},
        {"clock": "global"},
        {"catch_up": True},
        {"max_norm": None},
        {"warmup_fraction": 0.0},
        {"num_experts": 16, "num_probes": 4},
        {"num_experts": 16, "num_probes": 4, "key_init": "ffn"},
    ]
    for change in changes:
        yield replace(base, **change)


def perform_missing(runs: list[Run], results: Path, folder: Path, max_runs: int | None) -> int:
    """Perform what the results file lacks, append each line when it is done, and return how many there were."""
    done = {record["key"] for record in read_results(results)}
    lacking = [run for run in runs if run.key not in done]
    missing = lacking[:max_runs]
    click.echo(f"{len(runs)} runs, {len(runs) - len(lacking)} done, {len(missing)} to do now")
    for run in missing:
        try:
            record = perform(run, folder)
        except DeviceOutOfMemory as error:
            record = asdict(run) | {"out_of_memory": str(error)}
        with results.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"key": run.key, **record}) + "\n")
        click.echo(_line(record))
    return len(missing)


def read_results(path: Path) -> list[dict[str, Any]]:
    """The records so far; a last line cut off by a kill is left out."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except ValueError:
            click.echo("left out a line that is not whole", err=True)
    return records


def _line(record: dict[str, Any]) -> str:
    if "out_of_memory" in record:
        return f"{record['method']}: {record['out_of_memory']}"
    changed = {name: record[name] for name in ("key_init", "clock", "catch_up", "num_experts", "top_k", "width")}
    return (
        f"{record['method']:9} lr {record['learning_rate']:.0e} seed {record['seed']}: "
        f"exact match {record['exact_match']['exact_match']:.3f}, prose loss {record['forgetting']['prose_loss']:.3f}, "
        f"method {record['method_bytes'] / 2**20:.1f} MiB, {record['training_seconds']:.0f} s {changed}"
    )


# --- the result ------------------------------------------------------------------------------------------------------


def summarise(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per method, budget, facts and length of training its best learning rate by the mean exact match over seeds, of
    those with the most seeds."""
    groups: defaultdict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for record in records:
        if "out_of_memory" not in record:
            groups[*_compared(record), record["method"], record["learning_rate"]].append(record)
    best: dict[tuple[Any, ...], dict[str, Any]] = {}
    for (*compared, method, rate), some in groups.items():
        named = dict(zip(COMPARED, compared, strict=True)) | {"method": method, "learning_rate": rate}
        row = _mean_of(some) | named | {"seeds": sorted(each["seed"] for each in some)}
        place = *compared, method
        if place not in best or _rank(row) > _rank(best[place]):
            best[place] = row
    return sorted(best.values(), key=lambda row: (*_compared(row), METHODS.index(row["method"])))


def _compared(record: dict[str, Any]) -> tuple[Any, ...]:
    """What the methods of one comparison have in common."""
    return tuple(record.get(name) or USUAL.get(name, 0) for name in COMPARED)


def _rank(row: dict[str, Any]) -> tuple[int, float]:
    return len(row["seeds"]), row["exact_match"]


def _mean_of(records: list[dict[str, Any]]) -> dict[str, Any]:
    matches = [record["exact_match"]["exact_match"] for record in records]
    names = ("peak_allocated_bytes", "method_bytes", "h2d_bytes_per_step", "d2h_bytes_per_step", "training_seconds")
    means = {name: statistics.fmean(record[name] for record in records) for name in names}
    spread = statistics.stdev(matches) if len(matches) > 1 else None
    counts = sorted(set.intersection(*(set(record.get("fewer_rows", {})) for record in records)), key=int)
    fewer = {rows: _mean_asked([record["fewer_rows"][rows] for record in records]) for rows in counts}
    cpu = [record["training_cpu_seconds"] for record in records if "training_cpu_seconds" in record]
    means["training_cpu_seconds"] = statistics.fmean(cpu) if cpu else None
    return {**_mean_asked(records), "exact_match_stdev": spread, "fewer_rows": fewer, **means}


def _mean_asked(records: list[dict[str, Any]]) -> dict[str, float]:
    forgetting = {
        name: statistics.fmean(record["forgetting"][name] for record in records)
        for name in ("prose_loss", "capitals_exact_match")
    }
    return {"exact_match": statistics.fmean(_exact_match(record) for record in records), **forgetting}


NAMES = {
    "meft": "MEFT",
    "parallel": "dense adapter of MEFT's width",
    "offload": "dense adapter, moved whole",
    "narrow": "narrow dense adapter",
    "lora": "LoRA, every linear layer",
    "lora-16": "LoRA of rank 16",
    "full": "full fine-tuning",
}
HEADROOM = 0.02
FAR_BELOW = 0.25
"""What lies so far below the best is named at the lower edge: the axis is for telling the others apart."""


def draw(records: list[dict[str, Any]], path: Path) -> None:
    """Two panels of every method at its best rate, means over seeds with their standard deviation: exact match against
    the device memory that the method takes beside the frozen model, and against the loss on other prose.

    The axis of exact match shows the range in which methods differ; one far below it is named at the lower edge.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib import ticker

    rows = [row for row in summarise(records) if row["method"] != "none"]
    rows.sort(key=lambda row: row["method_bytes"])
    best = max(row["exact_match"] for row in rows)
    near = [row for row in rows if row["exact_match"] > best - FAR_BELOW]
    floor = min(row["exact_match"] - (row["exact_match_stdev"] or 0.0) for row in near) - HEADROOM
    figure, (by_memory, by_loss) = plt.subplots(1, 2, figsize=(12, 4.4), sharey=True, layout="constrained")
    handles: list[Any] = []
    for place, row in zip(_apart([row["method_bytes"] / 2**20 for row in rows]), rows, strict=True):
        handles += _draw_row(row, place, by_memory, by_loss, floor)
    for untrained in (row for row in summarise(records) if row["method"] == "none"):
        handles.append(by_loss.axvline(untrained["prose_loss"], color="black", linestyle=":", label="before training"))
    by_memory.set(xscale="log", xlabel="device memory of the method, MiB", ylabel="exact match")
    by_memory.set_ylim(floor, best + HEADROOM)
    by_memory.margins(x=0.12)
    by_memory.yaxis.set_major_locator(ticker.MaxNLocator(steps=[1, 2, 5, 10]))
    by_memory.yaxis.set_major_formatter(ticker.PercentFormatter(1.0, decimals=0))
    by_memory.xaxis.set_major_formatter(ticker.FuncFormatter(lambda size, _: f"{size:g}"))
    by_loss.set(xlabel="loss on other prose, which training should leave alone")
    for axes in (by_memory, by_loss):
        axes.grid(alpha=0.3)
    by_loss.legend(handles=handles, fontsize="small", loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _apart(places: list[float]) -> list[float]:
    """Ascending places on a logarithmic axis, moved so that no two marks lie on one another."""
    moved: list[float] = []
    for place in places:
        moved.append(max(place, moved[-1] * 1.12) if moved else place)
    return moved


def _draw_row(row: dict[str, Any], mebibytes: float, by_memory: Any, by_loss: Any, floor: float) -> list[Any]:
    """One method in both panels, MEFT's with fewer rows a token beside it; what the legend shows of it."""
    score, spread = row["exact_match"], row["exact_match_stdev"] or 0.0
    spread_text = f" ± {spread:.1%}" if spread else ""
    label = f"{NAMES[row['method']]}: {row['method_bytes'] / 2**20:,.1f} MiB, {score:.1%}{spread_text}"
    color = f"C{METHODS.index(row['method'])}"
    marker = "s" if row.get("active_rows_cap") else "o"  # a budget of its own
    below = score < floor
    style = {"color": color, "marker": "v" if below else marker, "linestyle": "none", "capsize": 3}
    shown = floor if below else score
    for axes, place in ((by_memory, mebibytes), (by_loss, row["prose_loss"])):
        drawn = axes.errorbar(
            place, shown, yerr=0 if below else spread, label=label, clip_on=not below, zorder=3, **style
        )
        if below:
            at = {"xytext": (7, 5), "textcoords": "offset points", "fontsize": "small", "color": color}
            axes.annotate(f"{score:.0%}, below", (place, shown), **at)
    fewer = [(each["prose_loss"], each["exact_match"]) for each in row["fewer_rows"].values()]
    points = [(loss, match) for loss, match in fewer if match >= floor]
    if not points:
        return [drawn]
    text = f"the same, a token meets {', '.join(row['fewer_rows'])} rows at inference"
    line = {"color": color, "markerfacecolor": "none", "linewidth": 1, "label": text}
    return [drawn, *by_loss.plot(*zip(*points, strict=True), f"{marker}--", **line)]


# --- commands --------------------------------------------------------------------------------------------------------


def listed(text: str, kind: type) -> tuple[Any, ...]:
    """``"0,1,2"`` as values of a kind; raises :class:`click.BadParameter`."""
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError as error:
        raise click.BadParameter(f"{text!r}: give {kind.__name__} values with commas between them") from error


@click.group(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
def main() -> None:
    """Compare methods at storing facts."""


def _common(function: Any) -> Any:
    for option in (
        click.option("--results", type=click.Path(path_type=Path), required=True, help="One JSON line per run."),
        click.option("--model", type=click.Path(path_type=Path), help="A model's folder [default: SmolLM2-135M]."),
        click.option("--facts", type=int, default=500),
        click.option("--epochs", type=int, default=6),
        click.option("--width", type=int, default=1024),
        click.option("--top-k", type=int, default=32),
        click.option("--active-rows-cap", type=int, help="Rows in meft's buffers: its budget [default: all]."),
        click.option("--tokens-see", type=click.Choice(["union", "own"]), default="union"),
        click.option("--batch-size", type=int, default=16),
        click.option("--seq-len", type=int, default=11, help="Longer facts are left out."),
        click.option("--seeds", default="0,1,2"),
        click.option("--max-runs", type=int, help="Stop after so many."),
    ):
        function = option(function)
    return function


@main.command()
@_common
@click.option("--methods", default=",".join(METHODS))
@click.option("--learning-rates", help="Instead of each method's own grid.")
@click.option("--quick", is_flag=True, help="A few facts, one seed and one learning rate of three methods.")
def run(
    results: Path, model: Path | None, seeds: str, max_runs: int | None, methods: str, learning_rates: str | None,
    quick: bool, **given: Any
) -> None:  # fmt: skip
    """Perform what is missing of the comparison."""
    base = Run("none", 0.0, 0, **given)
    chosen, rates, numbers = listed(methods, str), dict(LEARNING_RATES), listed(seeds, int)
    if quick:
        base = replace(base, facts=8, epochs=6, forgetting_texts=2, forgetting_items=2)
        chosen, numbers, rates = (
            ("meft", "parallel", "lora"),
            (0,),
            {"meft": (2e-3,), "parallel": (2e-3,), "lora": (1e-3,)},
        )
    if learning_rates is not None:
        rates = dict.fromkeys(chosen, listed(learning_rates, float)) | {"none": (0.0,)}
    folder = model or smollm2_folder(click.echo)
    first = first_stage(chosen, numbers[0], base, rates, shape_of(folder))
    performed = perform_missing(first, results, folder, max_runs)
    if len(numbers) > 1 and performed != max_runs:
        left = None if max_runs is None else max_runs - performed
        perform_missing(second_stage(first, read_results(results), numbers[1:]), results, folder, left)


@main.command("details")
@_common
@click.option("--learning-rate", type=float, default=2e-3)
def details_command(
    results: Path, model: Path | None, seeds: str, max_runs: int | None, learning_rate: float, **given: Any
) -> None:
    """Perform what is missing of the learning details: one change at a time."""
    runs = [each for seed in listed(seeds, int) for each in details(Run("meft", learning_rate, seed, **given))]
    perform_missing(runs, results, model or smollm2_folder(click.echo), max_runs)


@main.command("report")
@click.option("--results", type=click.Path(path_type=Path), required=True)
@click.option("--json", "json_path", type=click.Path(path_type=Path))
@click.option("--figure", type=click.Path(path_type=Path))
@click.option("--facts", type=int, help="Only runs of so many facts.")
def report_command(results: Path, json_path: Path | None, figure: Path | None, facts: int | None) -> None:
    """One table and one figure."""
    records = [record for record in read_results(results) if facts in (None, record["facts"])]
    rows = summarise(records)
    titles = (
        "method",
        "facts",
        "epochs",
        "cap",
        "rate",
        "seeds",
        "exact match",
        "prose loss",
        "capitals",
        "method MiB",
        "peak MiB",
        "traffic",
        "CPU s",
    )
    click.echo("{:10} {:>6} {:>6} {:>5} {:>6} {:>5} {:>12} {:>10} {:>8} {:>10} {:>8} {:>8} {:>6}".format(*titles))
    for row in rows:
        traffic = (row["h2d_bytes_per_step"] + row["d2h_bytes_per_step"]) / 2**20
        spread = "" if row["exact_match_stdev"] is None else f"±{row['exact_match_stdev']:.2f}"
        cpu = "" if row["training_cpu_seconds"] is None else f"{row['training_cpu_seconds']:.0f}"
        click.echo(
            f"{row['method']:10} {row['facts']:6} {row['epochs']:6} "
            f"{row['active_rows_cap'] or 'all':>5} {row['learning_rate']:6.0e} {len(row['seeds']):5} "
            f"{row['exact_match']:7.3f}{spread:5} "
            f"{row['prose_loss']:10.3f} {row['capitals_exact_match']:8.3f} {row['method_bytes'] / 2**20:10.1f} "
            f"{row['peak_allocated_bytes'] / 2**20:8.1f} {traffic:8.1f} {cpu:>6}"
        )
        for rows, asked in row["fewer_rows"].items():
            scores = (
                f"{asked['exact_match']:7.3f}      {asked['prose_loss']:10.3f} {asked['capitals_exact_match']:8.3f}"
            )
            click.echo(f"{f'  with {rows} rows a token at inference':47} {scores}")
    if json_path is not None:
        json_path.write_text(json.dumps({"best": rows, "runs": records}, indent=1) + "\n")
    if figure is not None:
        draw(records, figure)


if __name__ == "__main__":
    main()
