"""The campaigns in a reduced form, and that they can fail."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from places import ROOT

CAMPAIGN = ROOT / "campaigns" / "bad_bytes.py"


def test_bad_bytes_in_a_reduced_form(tmp_path) -> None:
    """Every kind of file several times; the committed result is of many more."""
    path = tmp_path / "result.json"
    command = [sys.executable, CAMPAIGN, "--count", "240", "--seed", "3", "--json", path]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(path.read_text())
    assert (result["counts"]["tried"], result["counts"]["passed"]) == (240, 240)
    assert len(result["seeds"]["3"]["details"]) == 24
    assert result["counts"]["refused"] > 100


def test_the_campaign_fails_where_a_reader_does(tmp_path) -> None:
    """A reader of tasks that knows nothing of deep nesting, a checkpoint's that looks a name up, and one that hangs."""
    broken = tmp_path / "broken.py"
    broken.write_text(
        "import runpy, sys, time\n"
        "import meft.runtime.session.checkpoint as checkpoint\n"
        "real = checkpoint.load_tensors\n"
        "def careless(path, **wanted):\n"
        "    tensors = real(path, **wanted)\n"
        "    if 'rng_state' not in tensors and 'optimizer' in path.name: raise KeyError('rng_state')\n"
        "    return tensors\n"
        "checkpoint.load_tensors = careless\n"
        f"sys.argv[0] = {str(CAMPAIGN)!r}\n"
        f"runpy.run_path({str(CAMPAIGN)!r}, run_name='__main__')\n"
    )
    script = CAMPAIGN.read_text().replace("sys.executable, __file__", f"sys.executable, {str(broken)!r}")
    changed = tmp_path / "bad_bytes.py"
    changed.write_text(script.replace("Path(__file__).parents[1]", f"Path({str(ROOT)!r})"))
    command = [sys.executable, changed, "--only", "170998", "--seed", "11"]
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(CAMPAIGN.parent), *sys.path])}
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, env=env)
    assert done.returncode == 1
    assert '"why": "KeyError"' in done.stderr, done.stderr[-3000:]


def test_a_load_in_a_reduced_form(tmp_path) -> None:
    """Two runs at once with an empty cache, one core, and a run of 120 steps; the committed result is of 10,000."""
    path = tmp_path / "result.json"
    command = [sys.executable, CAMPAIGN.with_name("load.py"), "--count", "120", "--json", path]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600, env=env)
    result = json.loads(path.read_text())
    assert (done.returncode, result["counts"]) == (0, {"tried": 3, "passed": 3, "failed": 0}), result["parts"]
