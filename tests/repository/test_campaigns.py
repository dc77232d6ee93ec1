"""The campaigns in a reduced form, and that they can fail."""

from __future__ import annotations

import json
import subprocess
import sys

from places import ROOT

CAMPAIGN = ROOT / "campaigns" / "bad_bytes.py"


def test_bad_bytes_in_a_reduced_form(tmp_path) -> None:
    """Every kind of file several times; the committed result is of many more."""
    path = tmp_path / "result.json"
    command = [sys.executable, CAMPAIGN, "--count", "230", "--seed", "3", "--json", path]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(path.read_text())
    assert (result["tried"], result["failed"]) == (230, 0)
    assert len(result["by_target"]) == 23
    assert result["refused"] > 100


def test_the_campaign_fails_where_a_reader_does(tmp_path) -> None:
    """A reader of tasks that knows nothing of deep nesting, a checkpoint's that looks a name up, and one that hangs."""
    broken = tmp_path / "broken.py"
    broken.write_text(
        "import runpy, sys, time\n"
        "import meft.runtime.session.checkpoint as checkpoint\n"
        "real = checkpoint.load_tensors\n"
        "def careless(path):\n"
        "    tensors = real(path)\n"
        "    if 'rng_state' not in tensors and 'optimizer' in path.name: raise KeyError('rng_state')\n"
        "    return tensors\n"
        "checkpoint.load_tensors = careless\n"
        f"sys.argv[0] = {str(CAMPAIGN)!r}\n"
        f"runpy.run_path({str(CAMPAIGN)!r}, run_name='__main__')\n"
    )
    script = CAMPAIGN.read_text().replace("sys.executable, __file__", f"sys.executable, {str(broken)!r}")
    changed = tmp_path / "bad_bytes.py"
    changed.write_text(script.replace("Path(__file__).parents[1]", f"Path({str(ROOT)!r})"))
    command = [sys.executable, changed, "--only", "1079", "--seed", "11"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 1
    assert '"outcome": "KeyError"' in done.stderr, done.stderr[-3000:]
