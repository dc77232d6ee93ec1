"""The stub of the driver's NVML library, and asking the real nvidia-ml-py about it in a process of its own.

The loader reads ``LD_LIBRARY_PATH`` when a process starts, so every question is a new one. Its code finds ``stub``
(``stub(*lines)`` rewrites the card) and ``reader()`` and prints one JSON value.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

SOURCE = Path(__file__).with_name("nvml_stub.c")
PID = 4321
PRELUDE = f"""
import json, os, pathlib
from meft.runtime.device import nvml
nvml.SAMPLE_SECONDS = 3600.0  # sampling is the test's
def stub(*lines):
    path = pathlib.Path(os.environ["MEFT_NVML_STUB"])
    path.with_suffix(".new").write_text("".join(line + "\\n" for line in lines))
    path.with_suffix(".new").replace(path)
def reader(clock=None, **given):
    given = {{"identity": nvml.DeviceIdentity("1111-2222", None), "pid": {PID}}} | given
    return nvml.NvmlReader.open(0, **given, **({{}} if clock is None else {{"clock": clock}}))
def answer(value):
    print(json.dumps(value))
"""


def build(folder: Path, *options: str) -> Path:
    """Compile the stub into ``folder``, or skip the test with the reason."""
    if not sys.platform.startswith("linux"):
        pytest.skip("the stub is a shared library for Linux")
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("no C compiler is installed: the stub of NVML cannot be built")
    library = folder / "libnvidia-ml.so.1"
    command = [compiler, "-std=c11", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", *options]
    subprocess.run([*command, "-o", library, SOURCE], check=True)
    return library


@dataclass(frozen=True)
class Stub:
    """A compiled stub; ``control`` is the file that says what its card answers."""

    library: Path
    control: Path

    def ask(self, code: str, *lines: str) -> Any:
        """What ``code`` answers in a new process, the card as ``lines`` say to begin with."""
        self.control.write_text("".join(line + "\n" for line in lines))
        searched = [str(self.library.parent), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
        environment = os.environ | {
            "LD_LIBRARY_PATH": os.pathsep.join(searched),
            "MEFT_NVML_STUB": str(self.control),
        }
        command = [sys.executable, "-c", PRELUDE + code]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)
