"""Coverage-guided fuzzing of the two readers of bytes: memory snapshots (pickled or JSON) and safetensors files.

    pip install atheris      # optional: wheels for Linux, in a development installation
    python campaigns/guided.py snapshot --seconds 120 --seed 1 --json campaigns/results/guided.json
    python campaigns/guided.py safetensors --seconds 120 --seed 1 --json campaigns/results/guided.json

atheris (libFuzzer) changes sound samples towards what reaches new lines of the reader. A run passes if every input is
read, or refused by a MeftError; any other exception, more than ten seconds or three GiB end it, with the input kept as
``crash-*`` or ``timeout-*`` in the working folder.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import pickle
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

SECONDS, MEMORY_MIB, LONGEST_BYTES = 10, 3072, 4096
MEMORY_FOLDER = Path("/dev/shm")
TARGETS = ("snapshot", "safetensors")
HOW = "campaigns/guided.py: atheris is not installed; pip install atheris (wheels for Linux)"


def snapshot_reader() -> Callable[[Path], object]:
    """Reads as ``meft-plan replay`` does."""
    import atheris

    sys.modules.pop("pickle", None)  # its unpickler in Python is what reads, so that is to be watched too
    with atheris.instrument_imports(include=["pickle", "meft.planner.allocator", "meft.planner.base.schema"]):
        from meft.planner.allocator.recording_files import load_recording
    return load_recording


def safetensors_reader() -> Callable[[Path], object]:
    """Reads as adapters and checkpoints are read."""
    import atheris

    with atheris.instrument_imports(include=["safetensors", "meft.runtime.session.tensor_files"]):
        from meft.runtime.session.tensor_files import load_tensors
    return load_tensors


def samples(target: str) -> list[bytes]:
    """What the fuzzer begins with."""
    if target == "safetensors":
        import torch
        from safetensors.torch import save

        return [save({"layers.0.rows": torch.ones(2, 3), "step": torch.arange(2)})]
    block = {"address": 1 << 40, "size": 512, "requested_size": 400, "state": "active_allocated", "frames": []}
    segment = {"address": 1 << 40, "total_size": 2 << 20, "stream": 0, "segment_type": "small", "device": 0}
    event = {"action": "alloc", "addr": 1 << 40, "size": 512, "stream": 0, "time_us": 1}
    content = {"segments": [segment | {"blocks": [block]}], "device_traces": [[event]]}
    return [pickle.dumps(content), pickle.dumps(content, protocol=2), json.dumps(content).encode()]


def fuzz(target: str, arguments: list[str]) -> None:
    """Be the fuzzer; never returns."""
    import atheris

    from meft.planner.base.errors import MeftError

    read = {"snapshot": snapshot_reader, "safetensors": safetensors_reader}[target]()
    suffix = {"snapshot": ".pickle", "safetensors": ".safetensors"}[target]
    with tempfile.TemporaryDirectory(dir=MEMORY_FOLDER if MEMORY_FOLDER.is_dir() else None) as folder:
        path = Path(folder) / f"input{suffix}"

        def one(data: bytes) -> None:
            path.write_bytes(data)
            try:
                read(path)
            except MeftError as error:
                if "\n" in str(error).strip():
                    raise AssertionError(f"not one line: {error}") from error

        atheris.Setup([sys.argv[0], *arguments], one)
        atheris.Fuzz()


def main() -> None:
    """Fuzz one reader in a process of its own, and note how it went."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--count", type=int, default=-1, help="inputs at most")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="where the result goes, beside the other reader's")
    parser.add_argument("--fuzz", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if importlib.util.find_spec("atheris") is None:
        sys.exit(HOW)
    if given.fuzz is not None:
        fuzz(given.target, given.fuzz)
        return
    with tempfile.TemporaryDirectory(prefix="meft-guided-") as corpus:
        for number, data in enumerate(samples(given.target)):
            (Path(corpus) / str(number)).write_bytes(data)
        options = [f"-max_total_time={given.seconds}", f"-runs={given.count}", f"-seed={given.seed}", corpus]
        options += [f"-timeout={SECONDS}", f"-rss_limit_mb={MEMORY_MIB}", f"-max_len={LONGEST_BYTES}"]
        done = subprocess.run(
            [sys.executable, __file__, given.target, "--fuzz", *options],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            check=False,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        kept = len(list(Path(corpus).iterdir()))
    covered = re.findall(r"cov: (\d+)", done.stderr)
    inputs = re.findall(r"Done (\d+) runs", done.stderr) or re.findall(r"^#(\d+)", done.stderr, re.MULTILINE)
    result = {
        "command": f"python campaigns/guided.py {given.target} --seconds {given.seconds} --seed {given.seed}",
        "inputs": int(inputs[-1]) if inputs else 0,
        "failed": int(done.returncode != 0),
        "lines_and_branches_reached": [int(covered[0]), int(covered[-1])] if covered else [],
        "inputs_that_reached_new_ones": kept,
        "said": done.stderr[-3000:] if done.returncode else "",
    }
    print(json.dumps(result, indent=1))
    if given.json is not None:
        before = json.loads(given.json.read_text()) if given.json.exists() else {"campaign": "guided"}
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps(before | {given.target: result}, indent=1) + "\n")
    sys.exit(done.returncode != 0)


if __name__ == "__main__":
    main()
