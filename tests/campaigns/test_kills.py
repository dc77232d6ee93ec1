"""A few trials of the campaign of kills."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from places import ROOT


def test_a_few_runs_survive_what_happens_to_them(tmp_path) -> None:
    """Thirteen trials: ten kills, two signals and a broken disk."""
    result = tmp_path / "result.json"
    done = subprocess.run(
        [sys.executable, ROOT / "campaigns" / "kills.py", "--count", "13", "--seed", "3", "--json", result],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    content = json.loads(result.read_text())["seeds"]["3"]
    assert (content["trials"], content["failures"]) == (13, [])
    counts = content["counts"]
    assert counts["write: passed"] + counts["fault: passed"] >= 4
    assert content["details"]["calls in a run"] > 100
