"""A few trials of the campaign of kills."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from places import ROOT


def test_a_few_runs_survive_what_happens_to_them(tmp_path) -> None:
    """Twelve trials, three of each kind; the seed has hits of all of them."""
    result = tmp_path / "result.json"
    done = subprocess.run(
        [sys.executable, ROOT / "campaigns" / "kills.py", "--count", "12", "--seed", "3", "--json", result],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    content = json.loads(result.read_text())
    assert content["failures"] == []
    trials = content["trials"]
    assert sum(kind["passed"] for kind in trials.values()) >= 4
    assert trials["write"]["passed"] + trials["fault"]["passed"] >= 2
    assert content["calls_in_a_run"] > 100
