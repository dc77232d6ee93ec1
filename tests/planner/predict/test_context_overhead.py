"""What CUDA's context and modules take: published figures, and a user's own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from meft.planner.base.errors import EXIT_DONE, EXIT_USAGE
from meft.planner.cli.main import command
from meft.planner.records.plan import Plan
from meft.planner.records.profile_catalogue import gpu_names, load_gpu

MIB, GIB = 2**20, 2**30
PUBLISHED_MIB = {"rtx-3090": 1687, "v100-16gb": 1343, "rtx-6000-ada": 426, "a100-40gb": 1443}
"""torch 1.8; CUDA 11.2; context only with torch 2.10 and CUDA 13.0; the least seen."""
PLAN = ["--gpu", "rtx-4090", "--host-mem", "64GB", "--adapter-width", "1024", "--top-k", "64"]


@pytest.fixture(autouse=True)
def _in_a_new_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(command, list(arguments))


@pytest.mark.parametrize("name", [name for name in gpu_names() if name != "emulated"])
def test_a_context_is_measured_only_where_a_figure_was_published_for_the_card(name: str) -> None:
    context = load_gpu(name).context
    assert context.basis == ("measured" if name in PUBLISHED_MIB else "assumed")
    if name in PUBLISHED_MIB:
        assert PUBLISHED_MIB[name] * MIB in (context.low_bytes, context.high_bytes)
        assert f"{PUBLISHED_MIB[name]} MiB" in context.source
    else:
        assert context.source.startswith("no figure published for this card: ")


def test_a_plan_takes_the_overhead_that_is_given_instead_of_the_cards_range() -> None:
    assert run(*PLAN, "--context-overhead", "512MiB").exit_code == EXIT_DONE
    memory = Plan.load("plan.json").prediction.device_memory
    assert (memory.context_bytes.low_bytes, memory.context_bytes.high_bytes) == (512 * MIB, 512 * MIB)
    assert (memory.context_bytes.basis, memory.context_bytes.source) == ("measured", "given on the command line")
    assert memory.process_bytes.low_bytes == memory.process_bytes.high_bytes == memory.peak_reserved_bytes + 512 * MIB
    assert memory.allocator_budget_bytes == load_gpu("rtx-4090").total_bytes - 512 * MIB
    run(*PLAN)
    usual = Plan.load("plan.json").prediction.device_memory
    assert usual.context_bytes.low_bytes < usual.context_bytes.high_bytes


@pytest.mark.parametrize("method", ["meft", "lora"])
def test_an_estimate_takes_it_too(method: str) -> None:
    machine = ["--gpu", "rtx-4090", "--host-mem", "64GB"]
    result = run("estimate", "--method", method, *machine, "--context-overhead", "1GiB", "--json")
    assert result.exit_code == EXIT_DONE, result.output
    content = json.loads(result.stdout)
    process = content["process_bytes"]
    assert process["low_bytes"] == process["high_bytes"] == content["peak_reserved_bytes"] + GIB


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--gpu-mem", "24GB", "--context-overhead", "-1"], "--context-overhead: '-1' is not a size; give a positive"),
        (["--gpu-mem", "24GB", "--context-overhead", "0"], "--context-overhead: '0' is not above zero"),
        (
            ["--gpu-mem", "24GB", "--context-overhead", "24GB"],
            "--context-overhead 24.00 GiB leaves nothing of the 24.00 GiB of GPU memory; give less, such as 600MiB",
        ),
        (
            ["--gpu", "emulated", "--gpu-mem", "2GB", "--context-overhead", "1GB"],
            "--context-overhead 1.00 GiB: --gpu emulated has no CUDA context; leave it out",
        ),
    ],
)
def test_an_overhead_that_cannot_be_is_refused(arguments: list[str], says: str) -> None:
    result = run(*arguments)
    assert result.exit_code == EXIT_USAGE
    assert result.stderr.startswith(f"meft-plan: {says}")
