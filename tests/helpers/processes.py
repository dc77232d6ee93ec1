"""Installed commands, run as users run them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

BIN = Path(sys.executable).parent


def run(*command: object, expect: int = 0) -> subprocess.CompletedProcess[str]:
    """Run an installed command; its exit code must be as expected and there is never a traceback."""
    program, *arguments = map(str, command)
    done = subprocess.run([BIN / program, *arguments], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == expect, done.stderr + done.stdout
    assert "Traceback" not in done.stderr
    return done
