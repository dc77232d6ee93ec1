"""Kill one of several ranks at a random moment, go on with another number of them, and compare with one rank.

    python campaigns/ranks.py --count 20 --seed 1 --json campaigns/results/ranks.json
    python campaigns/ranks.py --machines 2 --count 20 --seed 2 --json campaigns/results/machines.json
    python campaigns/ranks.py --machines 2 --rows owned --count 20 --seed 3 --json campaigns/results/owned.json

A trial runs a tiny model on two or four ranks under either schedule and kills one (SIGKILL) at a random moment, once or
twice, each time going on with one, two or four. With ``--machines 2`` those hit are in two groups that share no memory
and do not watch each other's processes, over loopback; those that go on are in one or two. With ``--rows owned`` each
group has its own part of the rows. It passes when

- all other ranks end within 30 seconds, with exit code 1 (or 0, where the hit came after the run);
- no process holds the ranks' shared memory any more;
- the run that goes on to the end exits 0 and leaves rows, moments, routers, counts, losses and norms equal bit for bit
  to those of one rank that nothing happened to.

Ranks are forks of this process, which has loaded everything but started no thread, with the environment that
``torchrun`` gives. A hit that comes after the run's end is not counted. Results of several sessions add up in
``--json FILE``. Exit code 1 if a trial fails.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

os.environ |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

import click
import torch
import torch.distributed
from kills import warm_up
from record import Record
from safetensors.torch import load_file
from tiny import make_tiny
from tqdm import tqdm  # type: ignore[import-untyped]

from meft.planner.records.plan import Plan
from meft.runtime.cli import run as cli
from meft.runtime.ranks import ordered
from meft.runtime.ranks.memory import NAME
from meft.runtime.session.checkpoint import list_checkpoints
from meft.runtime.training.interrupts import Interrupts

STEPS = 120
MOST_SECONDS = 30.0
SIZES = (1, 2, 4)


@dataclass
class Campaign:
    """A tiny model in ``work``, and what one rank learns from it when nothing happens."""

    work: Path
    record: Record
    machines: int = 1
    rows: str = "replicated"
    seconds: float = 0.0
    """What a run of one rank takes."""

    def prepare(self) -> None:
        """Load everything, start no thread, and run one rank to the end."""
        torch.set_num_threads(1)
        tqdm.monitor_interval = 0  # it would start a thread
        make_tiny(self.work)
        plan = Plan.load(self.work / "plan.json")
        request = plan.request.model_copy(update={"grad_accum": 4})
        decision = plan.decision
        if self.rows == "owned":
            decision = decision.model_copy(update={"rows": "owned", "gather_chunks": 1})
        plan.model_copy(update={"request": request, "decision": decision}).save(self.work / "plan.json")
        warm_up(self.work)
        ordered.warm_up()
        for _ in range(2):  # the first loads late, from disk
            shutil.rmtree(self.work / "straight", ignore_errors=True)
            started = time.monotonic()
            codes = ended(self.start(1, "straight", "--steps", str(STEPS)))
            self.seconds = time.monotonic() - started
        if codes != [0]:
            raise RuntimeError((self.work / "said-0").read_text())

    def start(self, size: int, name: str, *options: str, machines: int = 1) -> list[int]:
        """Begin ranks, in equal parts on so many machines; their process ids."""
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        words = [self.work / "plan.json", "--model", self.work / "model", "--data", self.work / "facts.jsonl"]
        words += ["--output-dir", self.work / name, "--save-every", 1, "--device", "emulated", *options]
        here = size // machines
        return [self._fork(rank, size, here, port, [str(word) for word in words]) for rank in range(size)]

    def trial(self, number: int) -> None:
        """Kill a rank once or twice, go on to the end, and compare."""
        chance, counts = random.Random(f"{self.record.seed}:{number}"), self.record.counts
        shutil.rmtree(self.work / "trial", ignore_errors=True)
        problems: list[str] = []
        hits = 0
        for _ in range(chance.choice((1, 2))):
            hit, wrong = self._hit(chance)
            hits += hit
            problems += wrong
            if problems or not hit:
                break
        if not hits and not problems:
            counts["after the end"] += 1
            return
        counts["tried"] += 1
        problems = problems or self._go_on(chance)
        counts["passed"] += not problems
        for problem in problems:
            self.record.fail(number, problem)

    def _hit(self, chance: random.Random) -> tuple[bool, list[str]]:
        size, schedule = chance.choice(SIZES[1:]), chance.choice(("overlapped", "sequential"))
        victim, delay = chance.randrange(size), chance.uniform(0, size * self.seconds / 2)
        ranks = self.start(size, "trial", *self._how(), "--schedule", schedule, machines=self.machines)
        time.sleep(delay)
        os.kill(ranks[victim], signal.SIGKILL)  # not waited for yet, so its number is its own
        killed = time.monotonic()
        codes = ended(ranks)
        seconds = time.monotonic() - killed
        self.record.note_largest("seconds to the end of all", seconds)
        hit = codes[victim] == -signal.SIGKILL and any(codes[:victim] + codes[victim + 1 :])
        if hit:
            where = "" if self.machines == 1 else f" on {self.machines} machines"
            self.record.counts[f"hit: {size} ranks{where}, {schedule}"] += 1
        wrong = [f"{seconds:.1f} s until all had ended"] * (seconds > MOST_SECONDS)
        wrong += [f"ranks ended with {codes}"] * (not set(codes) <= {0, 1, -signal.SIGKILL})
        firsts = ranks[:: size // self.machines]
        return hit, wrong + [f"{maps} holds shared memory" for first in firsts for maps in holders(first)]

    def _go_on(self, chance: random.Random) -> list[str]:
        size = chance.choice(SIZES)
        machines = chance.choice((1, 2)) if self.machines > 1 and size > 1 else 1
        codes = ended(self.start(size, "trial", *self._how(), machines=machines))
        if codes != [0] * size:
            said = (self.work / "said-0").read_text()
            return [] if codes[0] == 2 and "the run is complete" in said else [f"going on: {codes}: {said}"]
        before, after = learnt(self.work / "straight"), learnt(self.work / "trial")
        return [f"{name} differs" for name, tensor in before.items() if not torch.equal(tensor, after[name])]

    def _how(self) -> tuple[str, ...]:
        if list_checkpoints(self.work / "trial"):
            return ("--resume",)
        return ("--steps", str(STEPS), "--overwrite")

    def _fork(self, rank: int, size: int, here: int, port: int, words: list[str]) -> int:
        child = os.fork()
        if child:
            return child
        code = 99
        try:
            said = os.open(self.work / f"said-{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(said, 2)
            numbers = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": here, "MASTER_PORT": port}
            os.environ |= {name: str(number) for name, number in numbers.items()} | {"MASTER_ADDR": "127.0.0.1"}
            sys.argv = ["meft-run", *words]
            for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)):
                signal.signal(number, handler)  # a fresh process's, not the campaign's
            with Interrupts().installed() as interrupts:
                cli.main(interrupts)
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        finally:
            sys.stderr.flush()
            os._exit(code)


def ended(ranks: list[int]) -> list[int]:
    """Exit codes of all, negative for a signal; what does not end in time is killed, and told from others so."""
    codes: dict[int, int] = {}
    until = time.monotonic() + 4 * MOST_SECONDS
    while len(codes) < len(ranks):
        for rank in set(ranks) - codes.keys():
            process, status = os.waitpid(rank, os.WNOHANG)
            if process:
                codes[rank] = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > until:
                os.kill(rank, signal.SIGABRT)
        time.sleep(0.005)
    return [codes[rank] for rank in ranks]


def holders(first: int) -> list[str]:
    """Processes that have mapped the shared memory of ranks of which this was the first."""
    found = []
    for maps in Path("/proc").glob("[0-9]*/maps"):
        try:
            if NAME.format(process=first) in maps.read_text():
                found.append(str(maps))
        except OSError:  # it has ended
            continue
    return found


def learnt(output: Path) -> dict[str, torch.Tensor]:
    """Rows, routers, moments, counts, and the losses and norms of every step."""
    checkpoint = list_checkpoints(output)[-1]
    tensors = load_file(checkpoint / "meft_adapter.safetensors") | load_file(checkpoint / "optimizer.safetensors")
    del tensors["rng_state"]  # of several ranks it begins anew in every micro-batch
    state = json.loads((checkpoint / "training_state.json").read_text())
    for name in ("loss_per_step", "gradient_norm_per_optimizer_step"):
        tensors[name] = torch.tensor(state[name], dtype=torch.float64)
    return tensors


@click.command()
@click.option("--count", type=click.IntRange(min=1), default=20, show_default=True, help="Trials in all.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--seconds", type=float, help="Begin no trial after so long; the same command goes on.")
@click.option("--json", "path", type=click.Path(path_type=Path), help="Where results add up.")
@click.option("--machines", type=click.Choice(["1", "2"]), default="1", show_default=True, help="Groups that are hit.")
@click.option("--rows", type=click.Choice(["replicated", "owned"]), default="replicated", show_default=True)
@click.option("--only", type=click.IntRange(0), help="This trial alone, noted nowhere.")
def main(
    count: int, seed: int, seconds: float | None, path: Path | None, machines: str, rows: str, only: int | None
) -> None:
    """Kill ranks, let others go on, and compare."""
    name = "ranks" if machines == "1" else f"ranks --machines {machines}"
    name += "" if rows == "replicated" else f" --rows {rows}"
    record = Record(name, seed, path if only is None else None)
    with tempfile.TemporaryDirectory(prefix="meft-ranks-") as work:
        campaign = Campaign(Path(work), record, int(machines), rows)
        campaign.prepare()
        for number in record.numbers(count, seconds=seconds) if only is None else [only]:
            campaign.trial(number)
    record.tell()
    sys.exit(bool(record.failures))


if __name__ == "__main__":
    main()
