"""Damaged files, thousands of them: every reader says so in one line, at once, and in bounded memory.

    python campaigns/bad_bytes.py --count 10000 --seed 0 --json campaigns/results/bad_bytes.json

Sound samples of every kind of file that is read (plan, report, profiles, a model's config, weights and tokenizer,
adapter, checkpoint, memory snapshots, data) are made by a short run of the tests' tiny model. A trial changes one of
them (bytes, JSON values, a safetensors header, a record sealed with a new digest) and reads it as the commands do, in a
worker process whose address space is limited, with an alarm. A trial passes if the file is read, or refused by a
MeftError of one line (of data, a line for each of the first few bad lines); it fails on any other exception, on more
than :data:`LIMIT_SECONDS`, and if the worker dies. Which mutation a trial makes depends on the seed and its number
alone: ``--only N`` repeats one, and shows the traceback. Results of several sessions add up in ``--json FILE``.
"""

from __future__ import annotations

import argparse
import collections
import gzip
import json
import os
import pickle
import random
import resource
import select
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from record import Record

ROOT = Path(__file__).parents[1]
LIMIT_SECONDS = 10.0
MEMORY_BYTES = 3 << 30
"""Address space that a worker may add to what it has once everything is loaded."""
MAX_LINE = 4000
_DEEP = "\x00deep\x00"


@dataclass(frozen=True)
class Target:
    """A kind of file: a sound sample, where a changed one lies among others, and what reads it."""

    name: str
    sample: Path
    read: Callable[[Path], object]
    seal: Any = None
    """The class of record that a changed object is sealed as, with a digest of its own."""
    beside: Path | None = None
    """A folder whose other files lie beside the changed one."""


# --- samples and readers -----------------------------------------------------------------------------------------


def make_samples(folder: Path) -> None:
    """Fill a folder with a tiny model, a plan, data, and what a run of four steps leaves."""
    from click.testing import CliRunner
    from glass import save_glass
    from sessions import EXPERTS, small_plan

    from meft.runtime.cli.run import command

    model = save_glass(folder / "model")
    tokenizer = json.loads((model / "tokenizer_config.json").read_text())
    tokenizer["chat_template"] = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    (model / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    small_plan(model, choice=EXPERTS).save(folder / "plan.json")
    lines = [{"prompt": f"The {word} said", "completion": " so"} for word in ("hatter", "queen", "duchess")]
    (folder / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    arguments = ["train", folder / "plan.json", "--model", model, "--data", folder / "data.jsonl", "--steps", 2]
    done = CliRunner().invoke(command, [str(each) for each in [*arguments, "--output-dir", folder / "out"]])
    if done.exit_code:
        raise RuntimeError(f"the samples' own run failed: {done.output}")
    _make_profiles(folder)
    _make_snapshots(folder)


def _make_profiles(folder: Path) -> None:
    """One object of each of the shipped profile files, as a file of its own."""
    for name in ("gpus", "links", "hosts", "sparsity"):
        entries = json.loads((ROOT / "profiles" / f"{name}.json").read_text())
        key, first = next(iter(entries.items()))
        (folder / f"{name}.json").write_text(json.dumps(first | {"key": key}))


def _make_snapshots(folder: Path) -> None:
    block = {"address": 1 << 40, "size": 512, "requested_size": 400, "state": "active_allocated", "frames": []}
    segment = {"address": 1 << 40, "total_size": 2 << 20, "stream": 0, "segment_type": "small", "device": 0}
    rest = block | {"address": (1 << 40) + 512, "size": (2 << 20) - 512, "state": "inactive"}
    actions = ("segment_alloc", "alloc", "free_requested", "free_completed", "alloc")
    trace = [
        {"action": action, "addr": 1 << 40, "size": 2 << 20 if index == 0 else 512, "stream": 0, "time_us": index}
        for index, action in enumerate(actions)
    ]
    content = {"segments": [segment | {"blocks": [block, rest]}], "device_traces": [trace]}
    (folder / "snapshot.pickle").write_bytes(pickle.dumps(content))
    (folder / "snapshot.json").write_text(json.dumps(content))
    (folder / "snapshot.pickle.gz").write_bytes(gzip.compress(pickle.dumps(content)))


def targets(folder: Path) -> list[Target]:
    """Every kind of file with its reader; the session that checkpoints are read into is opened once."""
    from sessions import open_small
    from transformers.utils import logging

    from meft.planner.allocator.recording_files import load_recording
    from meft.planner.models.catalogue import load_model
    from meft.planner.records.plan import Plan
    from meft.planner.records.profile_catalogue import load_gpu, load_host, load_link, load_sparsity
    from meft.planner.records.report import Report
    from meft.runtime.data.loading import DataOptions, load_dataset
    from meft.runtime.data.task_sources import load_task
    from meft.runtime.session import checkpoint
    from meft.runtime.session.model_folder import load_causal_lm
    from meft.runtime.session.model_loading import check_model_folder, load_tokenizer
    from meft.runtime.use.adapter_model import AdapterModel
    from meft.runtime.use.generation import prompt_ids
    from meft.runtime.use.saved import load_base

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    model, plan = folder / "model", Plan.load(folder / "plan.json")
    tokenizer, session = load_tokenizer(model), open_small(model, plan)
    checkpoint_folder = checkpoint.latest_checkpoint(folder / "out")

    options = DataOptions(allow_cut=True)

    def plan_from(path: Path) -> None:
        load_model(str(path))
        _invoke_plan("estimate", "--method", "lora", "--model", str(path), "--seq-len", "32", "--json")

    def report_from(path: Path) -> None:
        Report.load(path)
        _invoke_plan("audit", str(folder / "plan.json"), str(path))

    def plan_and_audit(path: Path) -> None:
        Plan.load(path)
        _invoke_plan("audit", str(path), str(folder / "out" / "report.json"))

    def whole_model(path: Path) -> None:
        check_model_folder(plan, path.parent)
        load_causal_lm(path.parent)

    def whole_tokenizer(path: Path) -> None:
        read = load_tokenizer(path.parent)
        prompt_ids(read, "The hatter said", raw=False)
        prompt_ids(read, "The hatter said", raw=True)

    base = load_base(model)

    def adapter(path: Path) -> None:
        AdapterModel.from_pretrained(base, path.parent).detach()

    def resume(path: Path) -> None:
        checkpoint.load_checkpoint(session, path.parent)
        checkpoint.load_observed(path.parent)

    found = [
        Target("plan", folder / "plan.json", plan_and_audit, seal=Plan),
        Target("report", folder / "out" / "report.json", report_from, seal=Report),
        Target("gpu profile", folder / "gpus.json", lambda path: load_gpu(str(path))),
        Target("link profile", folder / "links.json", lambda path: load_link(str(path))),
        Target("host profile", folder / "hosts.json", lambda path: load_host(str(path))),
        Target("sparsity profile", folder / "sparsity.json", lambda path: load_sparsity(str(path))),
        Target("config.json for planning", model / "config.json", plan_from),
        Target("snapshot, pickled", folder / "snapshot.pickle", load_recording),
        Target("snapshot, json", folder / "snapshot.json", load_recording),
        Target("snapshot, gzip", folder / "snapshot.pickle.gz", load_recording),
        Target(
            "data",
            folder / "data.jsonl",
            lambda path: load_dataset(path, tokenizer, seq_len=24, options=options),
        ),
        Target("task", folder / "data.jsonl", lambda path: load_task(str(path), metric="em")),
    ]
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        found.append(Target(f"model: {name}", model / name, whole_model, beside=model))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        found.append(Target(f"tokenizer: {name}", model / name, whole_tokenizer, beside=model))
    for path in sorted((folder / "out" / "adapter").iterdir()):
        if path.suffix in (".json", ".safetensors"):
            seal = checkpoint.AdapterConfig if path.suffix == ".json" else None
            found.append(Target(f"adapter: {path.suffix}", path, adapter, seal, beside=path.parent))
    seals = {checkpoint.TRAINING_STATE: checkpoint.TrainingState, checkpoint.RUN_OBSERVED: checkpoint.RunObserved}
    for path in sorted(checkpoint_folder.iterdir()):
        if path.suffix in (".json", ".safetensors"):
            seal = seals.get(path.name)
            found.append(Target(f"checkpoint: {path.name}", path, resume, seal, beside=checkpoint_folder))
    return found


def _invoke_plan(*arguments: str) -> None:
    """A command of ``meft-plan`` in this process; what it raises is raised."""
    import click
    from click.testing import CliRunner

    from meft.planner.cli.main import command

    group = command.get_command(click.Context(command), arguments[0])
    assert group is not None
    done = CliRunner().invoke(group, list(arguments[1:]), standalone_mode=False)
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception


# --- mutations ---------------------------------------------------------------------------------------------------

HUGE = (2**31, 2**53 + 1, 2**63 - 1, 2**63, 2**64, 10**18, 10**400, -1, -(2**63), 0, 1e308, -1e308, 5e-324, 1e18)
ODD: tuple[Any, ...] = (
    *HUGE,
    *(
        float("nan"),
        float("inf"),
        None,
        True,
        False,
        "",
        "x" * 100_000,
        "\ud800",
        "\x00",
        "\u202e\U0001f600",
        "../../x",
    ),
    *([], {}, [[]], {"": None}, _DEEP, "1e999", "NaN", 0.5, 1, 2, 100_000),
)


def mutated(data: bytes, target: Target, dice: random.Random) -> tuple[str, bytes]:
    """What was done to a sample, and the outcome."""
    ways = [_bytes_changed] * 2
    if target.sample.suffix == ".json" or target.sample.name.endswith(".jsonl"):
        ways += [_json_changed] * 4
    if target.sample.suffix == ".safetensors":
        ways += [_header_changed] * 4
    if target.seal is not None:
        ways += [_sealed] * 4
    return dice.choice(ways)(data, target, dice)


def _bytes_changed(data: bytes, target: Target, dice: random.Random) -> tuple[str, bytes]:
    del target
    place, size = dice.randrange(len(data)), dice.choice((1, 2, 8, 64, 1024))
    noise = dice.randbytes(size)
    kind = dice.choice(("flip", "cut", "drop", "twice", "insert", "zero", "noise", "append", "digits", "empty", "utf8"))
    if kind == "flip":
        changed = bytearray(data)
        for _ in range(dice.choice((1, 1, 3, 20))):
            changed[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
        return kind, bytes(changed)
    outcome = {
        "cut": data[:place],
        "drop": data[:place] + data[place + size :],
        "twice": data[:place] + data[place : place + size] * 2 + data[place + size :],
        "insert": data[:place] + noise + data[place:],
        "zero": data[:place] + bytes(size) + data[place + size :],
        "noise": data[:place] + noise + data[place + size :],
        "append": data + noise,
        "digits": data[:place] + b"9" * dice.choice((1, 20, 5000)) + data[place:],
        "empty": b"",
        "utf8": data[:place] + dice.choice((b"\xff", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\x00")) + data[place:],
    }
    return kind, outcome[kind]


def _json_changed(data: bytes, target: Target, dice: random.Random) -> tuple[str, bytes]:
    lines = target.sample.name.endswith(".jsonl")
    parts = data.splitlines() if lines else [data]
    index = dice.randrange(len(parts))
    what, content = _value_changed(json.loads(parts[index]), dice)
    parts[index] = _dumped(content, dice)
    return what, b"\n".join(parts)


def _value_changed(content: Any, dice: random.Random) -> tuple[str, Any]:
    """One value of a JSON document replaced, left out, renamed, added or moved."""
    places = [place for place in _places(content) if len(place[1]) > 0]
    if not places or dice.random() < 0.02:
        return "whole", dice.choice(ODD)
    holder, path = dice.choice(places)
    key = path[-1]
    kind = dice.choice(("replace", "replace", "replace", "leave out", "rename", "add", "swap"))
    if kind == "replace":
        holder[key] = dice.choice(ODD)
    elif kind == "leave out":
        del holder[key]
    elif kind == "rename" and isinstance(holder, dict):
        holder[f"{key}{dice.choice(('x', '', ' ', chr(0), chr(0xD800)))}"] = holder.pop(key)
    elif kind == "add":
        if isinstance(holder, dict):
            holder[dice.choice(("auto_map", "unknown", "digest", "quantization_config", ""))] = dice.choice(ODD)
        else:
            holder.extend([dice.choice(ODD)] * dice.choice((1, 1000)))
    else:
        other, elsewhere = dice.choice(places)
        holder[key] = json.loads(json.dumps(other[elsewhere[-1]]))
    return f"{kind} {'.'.join(map(str, path))}"[:200], content


def _places(content: Any, path: tuple[Any, ...] = (), holder: Any = None) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    """Every place of a document: what holds it, and the path to it. Of a list's many members, a few."""
    if holder is not None:
        yield holder, path
    if isinstance(content, dict):
        for key, value in list(content.items())[:200]:
            yield from _places(value, (*path, key), content)
    elif isinstance(content, list):
        for index in range(min(len(content), 8)):
            yield from _places(content[index], (*path, index), content)


def _dumped(content: Any, dice: random.Random) -> bytes:
    text = json.dumps(content, ensure_ascii=dice.random() < 0.9)
    deep = dice.choice((50, 2000, 100_000))
    text = text.replace(json.dumps(_DEEP), dice.choice(("[", '{"a":')) * deep)  # not closed: read as deep as it goes
    if dice.random() < 0.05 and text.startswith("{") and ":" in text:
        text = "{" + text[1:].split(",", 1)[0].rstrip("}") + ", " + text[1:]  # a key twice
    return text.encode("utf-8", "surrogatepass")


def _header_changed(data: bytes, target: Target, dice: random.Random) -> tuple[str, bytes]:
    del target
    (size,) = struct.unpack("<Q", data[:8])
    if dice.random() < 0.2:
        length = dice.choice((0, 1, size - 1, size + 1, 2**31, 2**40, 2**63, 2**64 - 1))
        return f"header length {length}", struct.pack("<Q", length) + data[8:]
    what, content = _value_changed(json.loads(data[8 : 8 + size]), dice)
    header = _dumped(content, dice)
    return what, struct.pack("<Q", len(header)) + header + data[8 + size :]


def _sealed(data: bytes, target: Target, dice: random.Random) -> tuple[str, bytes]:
    """A value changed and the digest made anew, so that what reads on meets it."""
    from meft.planner.base.errors import MeftError
    from meft.planner.base.schema import validated

    what, content = _value_changed(json.loads(data), dice)
    if not isinstance(content, dict):
        return what, _dumped(content, dice)
    content.pop("digest", None)
    try:
        return f"sealed, {what}", validated(target.seal, content, source="sample").to_json().encode()
    except MeftError:  # refused before it could be sealed: read as it is
        return what, _dumped(content, dice)


# --- trials ------------------------------------------------------------------------------------------------------


class TooSlow(BaseException):
    """The alarm went off; no reader may catch it."""


def trial(number: int, seed: int, found: list[Target], folder: Path, *, show: bool = False) -> dict[str, Any]:
    """Damage one file and read it; what happened."""
    from meft.planner.base.errors import MeftError
    from meft.runtime.data.reading import MAX_REPORTED_LINES

    dice = random.Random(f"{seed}:{number}")
    target = found[number % len(found)]
    what, data = mutated(target.sample.read_bytes(), target, dice)
    result = {"number": number, "target": target.name, "mutation": what, "outcome": "read"}
    started = time.monotonic()
    try:
        with _laid_out(target, data, folder) as place, _alarm():
            target.read(place)
    except MeftError as error:
        text = str(error)
        result["outcome"] = "refused"
        lines = 1 if target.name != "data" else MAX_REPORTED_LINES + 2
        if len(text.strip().splitlines()) > lines or len(text) > MAX_LINE:
            result |= {"outcome": "not one line", "error": text[:500]}
    except TooSlow:
        result["outcome"] = "too slow"
    except Exception as error:  # noqa: BLE001 - that is what is looked for
        frames = traceback.extract_tb(error.__traceback__)
        ours = [f"{Path(each.filename).name}:{each.lineno}" for each in frames if "meft" in each.filename]
        result |= {"outcome": type(error).__name__, "error": str(error)[:300], "at": ours[-1:]}
        if show:
            traceback.print_exc()
    result["seconds"] = round(time.monotonic() - started, 3)
    return result


@contextmanager
def _laid_out(target: Target, data: bytes, folder: Path) -> Iterator[Path]:
    """The changed file in a folder of its own, among the files that belong beside it."""
    folder.mkdir()
    try:
        for other in target.beside.iterdir() if target.beside else ():
            if other.name != target.sample.name:
                os.link(other, folder / other.name)
        (folder / target.sample.name).write_bytes(data)
        yield folder / target.sample.name
    finally:
        shutil.rmtree(folder)


@contextmanager
def _alarm() -> Iterator[None]:
    signal.signal(signal.SIGALRM, _too_slow)
    signal.setitimer(signal.ITIMER_REAL, LIMIT_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def work(samples: Path, numbers: list[int], seed: int) -> None:
    """Trials in this process, each announced and then reported as a line of JSON on the real standard output."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints goes elsewhere
    found = targets(samples)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY_BYTES, resource.RLIM_INFINITY))
    for target in found:  # a sample that is refused as it is would prove nothing
        with _laid_out(target, target.sample.read_bytes(), samples / "sound") as place:
            target.read(place)
    show = len(numbers) == 1
    for number in numbers:
        print(json.dumps({"begins": number}), file=out, flush=True)
        folder = samples / f"trial-{os.getpid()}"
        print(json.dumps(trial(number, seed, found, folder, show=show)), file=out, flush=True)


def _too_slow(number: int, frame: object) -> None:
    del number, frame
    raise TooSlow


def run(numbers: list[int], seed: int, samples: Path) -> Generator[dict[str, Any], None, None]:
    """Results of trials in their order, from workers that are replaced when one dies or hangs."""
    left = collections.deque(numbers)
    while left:
        command = [sys.executable, __file__, "--work", str(samples), "--seed", str(seed)]
        worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=_errors(numbers))
        assert worker.stdin is not None
        worker.stdin.write(json.dumps(list(left)).encode())
        worker.stdin.close()
        try:
            yield from _results(worker, left)
        finally:
            worker.kill()
            worker.wait()
            shutil.rmtree(samples / f"trial-{worker.pid}", ignore_errors=True)


def _errors(numbers: list[int]) -> int | None:
    return None if len(numbers) == 1 or os.environ.get("MEFT_DEBUG") else subprocess.DEVNULL


def _results(worker: subprocess.Popen[bytes], left: collections.deque[int]) -> Iterator[dict[str, Any]]:
    """What a worker reports until it ends, and that it died or hung in a trial; ``left`` loses what is done."""
    assert worker.stdout is not None
    current: int | None = None
    waiting, patience = 120.0, 3 * LIMIT_SECONDS  # loading everything takes longer than a trial may
    while True:
        ready = select.select([worker.stdout], [], [], waiting)[0]
        line = worker.stdout.readline() if ready else b""
        if not line:
            if current is None and left:
                raise RuntimeError("a worker ended before its first trial; MEFT_DEBUG=1 shows why")
            if current is not None:
                left.remove(current)
                yield {"number": current, "outcome": "hung" if not ready else f"died ({worker.wait()})"}
            return
        said = json.loads(line)
        waiting = patience
        if "begins" in said:
            current = said["begins"]
        else:
            left.remove(said["number"])
            current = None
            yield said


def count(record: Record, result: dict[str, Any]) -> None:
    """One more trial: read, refused by one line, or a failure."""
    target, outcome = result.get("target", "unknown"), result["outcome"]
    passed = outcome in ("read", "refused")
    record.counts["tried"] += 1
    record.counts["passed"] += passed
    record.counts[outcome] += 1
    of_target = record.details.setdefault(target, {})
    of_target[outcome] = of_target.get(outcome, 0) + 1
    record.note_largest("seconds of a trial", result.get("seconds", 0.0))
    if not passed:
        record.fail(result["number"], outcome, **{name: result[name] for name in result if name != "number"})


def campaign(record: Record, trials: int, *, seconds: float | None) -> None:
    """Trials up to that number of the seed, from where its file stands."""
    with tempfile.TemporaryDirectory(prefix="meft-bad-bytes-") as samples:
        make_samples(Path(samples))
        results = run(list(range(record.trials, trials)), record.seed, Path(samples))
        for number in record.numbers(trials, seconds=seconds):
            result = next(results)
            assert result["number"] == number
            count(record, result)
        results.close()


def main() -> None:
    """Run the campaign; the exit code is 1 if a trial failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="where results add up")
    parser.add_argument("--only", type=int, help="this trial alone, noted nowhere")
    parser.add_argument("--seconds", type=float, help="begin no trial after so long; the same command goes on")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    sys.path.insert(0, str(ROOT / "tests" / "helpers"))
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if given.work is not None:
        work(given.work, json.load(sys.stdin), given.seed)
        return
    record = Record("bad_bytes", given.seed, given.json if given.only is None else None)
    if given.only is None:
        campaign(record, given.count, seconds=given.seconds)
    else:
        with tempfile.TemporaryDirectory(prefix="meft-bad-bytes-") as samples:
            make_samples(Path(samples))
            for result in run([given.only], given.seed, Path(samples)):
                count(record, result)
    record.tell()
    sys.exit(1 if record.failures or not record.counts["tried"] else 0)


if __name__ == "__main__":
    main()
