"""How long a plan takes from the shell, and how much memory, against importing the libraries that it needs.

    python benchmarks/cold_start.py [COMMAND ...]

runs ``meft-plan --gpu-mem 24GB --host-mem 64GB`` and ``python -c "import numpy, pydantic, click"`` in turn, each as a
process of its own, and prints the medians of their wall-clock and processor seconds and of their peak resident memory.
Both run once beforehand, so that files are in the page cache and all modules are compiled, as those of an installed
package are: what is compiled goes to a folder of its own, whatever the environment says of that. ``COMMAND`` takes the
place of ``meft-plan``, the one installed beside the interpreter, with the same options.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

RUNS = 15
KIB_PER_MIB = 1024
OPTIONS = ("--gpu-mem", "24GB", "--host-mem", "64GB")
LIBRARIES = (sys.executable, "-c", "import numpy, pydantic, click")


@dataclass(frozen=True)
class Run:
    """What one process took."""

    seconds: float
    processor_seconds: float
    peak_mib: float


def run(command: tuple[str, ...], folder: str) -> Run:
    """Run a command in a folder until it ends, which must be with success."""
    environment = os.environ | {"PYTHONPYCACHEPREFIX": str(Path(folder) / "compiled")}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    start = time.perf_counter()
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, env=environment)
    _, status, used = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    return Run(seconds, used.ru_utime + used.ru_stime, used.ru_maxrss / KIB_PER_MIB)


def median(runs: list[Run]) -> Run:
    """Of each figure."""
    return Run(
        statistics.median(each.seconds for each in runs),
        statistics.median(each.processor_seconds for each in runs),
        statistics.median(each.peak_mib for each in runs),
    )


def main() -> None:
    """Measure both in turn and print them."""
    plan_command = sys.argv[1:] or [str(Path(sys.executable).with_name("meft-plan"))]
    commands = {"meft-plan": (*plan_command, *OPTIONS), "libraries": LIBRARIES}
    runs: dict[str, list[Run]] = {name: [] for name in commands}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(1 + RUNS):
            for name, command in commands.items():
                runs[name].append(run(command, folder))
    medians = {name: median(those[1:]) for name, those in runs.items()}
    for name, found in medians.items():
        print(f"{name:10} {found.seconds:6.3f} s  {found.processor_seconds:6.3f} s cpu  {found.peak_mib:6.0f} MiB")
    plan, libraries = medians["meft-plan"], medians["libraries"]
    of_cpu, of_memory = plan.processor_seconds / libraries.processor_seconds, plan.peak_mib / libraries.peak_mib
    print(f"ratio      {plan.seconds / libraries.seconds:6.2f}    {of_cpu:6.2f} of cpu  {of_memory:6.2f} of memory")


if __name__ == "__main__":
    main()
