"""``meft-plan`` as it is typed: what it writes and prints, what it refuses and with which exit code."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from plan_samples import sample_plan, sample_report, shallow_model

import meft.planner.front.request as front_request
from meft.planner.base.errors import EXIT_DONE, EXIT_INFEASIBLE, EXIT_UNEXPECTED, EXIT_USAGE
from meft.planner.base.units import format_seconds
from meft.planner.cli.main import command
from meft.planner.front.options import RequestOptions
from meft.planner.front.request import default_gpu, planning
from meft.planner.memory.budget import host_budget_bytes
from meft.planner.records.plan import Plan
from meft.planner.records.profile_catalogue import gpu_names, load_gpu
from meft.planner.search.search import make_plan

GIB = 1 << 30
SMALL = ["--model", "smollm2-135m", "--gpu", "emulated", "--host-mem", "4GB", "--seq-len", "64", "--top-k", "32"]
"""A search of a few thousand decisions."""


@pytest.fixture(autouse=True)
def _in_a_new_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")  # no wrapping between words that tests look for


def run(*arguments: str) -> Result:
    return CliRunner().invoke(command, list(arguments))


def refused(*arguments: str, exit_code: int = EXIT_USAGE) -> str:
    """The one line on standard error."""
    result = run(*arguments)
    assert result.exit_code == exit_code, result.output
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("meft-plan: ")
    assert "Traceback" not in result.stderr
    return lines[0]


# --- planning -------------------------------------------------------------------------------------------------------


def test_a_budget_alone_plans_the_papers_model() -> None:
    result = run("--gpu-mem", "24GB", "--host-mem", "64GB")
    assert result.exit_code == EXIT_DONE, result.output
    plan = Plan.load("plan.json")
    request = plan.request
    assert (request.model.name, request.batch_size, request.seq_len) == ("llama-7b", 2, 256)
    assert (request.gpu_mem_bytes, request.host_mem_bytes) == (24 * GIB, 64 * GIB)
    assert (request.weights_dtype, request.adapter_dtype, request.gpu) == ("bf16", "bf16", "rtx-3090")
    assert "rtx-3090 stands in for the card: no --gpu was given" in result.stdout
    assert "meft-run plan.json --model DIR --data FILE.jsonl" in result.stdout
    assert result.stdout.rstrip().endswith("wrote plan.json")


def test_the_alias_is_the_same_command() -> None:
    run("--gpu-mem", "1GB", *SMALL)
    first = Path("plan.json").read_bytes()
    assert run("plan", "--gpu-mem", "1GB", *SMALL, "-o", "again.json").exit_code == EXIT_DONE
    assert Path("again.json").read_bytes() == first


def test_json_is_the_plan_and_nothing_else() -> None:
    result = run("--gpu-mem", "1GB", *SMALL, "--json", "-o", "there/p.json")
    assert result.stdout == Path("there/p.json").read_text()
    assert Plan.from_json(result.stdout, source="stdout") == Plan.load("there/p.json")


def test_tokens_are_told_in_hours_and_leave_the_plan_alone() -> None:
    assert "tokens in" not in run("--gpu-mem", "1GB", *SMALL).stdout
    without = Path("plan.json").read_bytes()
    result = run("--gpu-mem", "1GB", *SMALL, "--tokens", "1.5M")
    assert Path("plan.json").read_bytes() == without
    seconds = 1_500_000 / Plan.load("plan.json").prediction.timing.tokens_per_second
    assert f"1.5 M tokens in {format_seconds(seconds)}; " in result.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ["--gpu-mem", "24GB", "--tokens", "10M"],
        ["--gpu", "rtx-4090", "--model", "mistral-7b", "--seq-len", "1024", "--tokens", "1.5B"],
        ["--gpu", "emulated", "--gpu-mem", "2GB", "--model", "smollm2-135m", "--sparsity", "smollm2-facts"],
    ],
    ids=["paper", "card", "emulated"],
)
def test_a_plan_is_told_in_25_lines(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(front_request, "machine_memory_bytes", lambda: 64 * GIB)
    monkeypatch.setenv("COLUMNS", "100")
    result = run(*arguments)
    assert result.exit_code == EXIT_DONE, result.output
    assert len(result.stdout.splitlines()) <= 25
    assert "One change alone" in result.stdout
    assert "checkpointing" in result.stdout


def test_fixed_choices_are_kept() -> None:
    fixed = ["--adapter-width", "1000", "--prefetch-depth", "2", "--routing", "exact", "--rows-in-backward", "retained"]
    assert run("--gpu-mem", "2GB", *SMALL, *fixed, "--activation-checkpointing").exit_code == EXIT_DONE
    decision = Plan.load("plan.json").decision
    assert (decision.adapter_width, decision.top_k, decision.prefetch_depth) == (1000, 32, 2)
    assert (decision.routing, decision.rows_in_backward) == ("exact", "retained")
    assert decision.activation_checkpointing


def test_a_bf16_copy_can_be_asked_for_and_refused() -> None:
    fixed = ["--gpu-mem", "2GB", *SMALL, "--adapter-width", "512", "--adapter-dtype", "bf16", "--max-slowdown", "9"]
    made = []
    for flag in ("--bf16-copy", "--no-bf16-copy"):
        result = run(*fixed, flag)
        assert result.exit_code == EXIT_DONE, result.output
        made.append(Plan.load("plan.json"))
    assert [plan.decision.bf16_copy for plan in made] == [plan.request.bf16_copy for plan in made] == [True, False]
    copied = {entry.category: entry.num_bytes for entry in made[0].prediction.host_memory.entries}
    assert copied["adapter_bf16_copy"] == 30 * 512 * 2 * 576 * 2
    line = refused("--gpu-mem", "1GB", *SMALL, "--bf16-copy")
    assert "--bf16-copy: the adapter's rows travel in fp32" in line
    assert line.endswith("--adapter-dtype bf16")


def test_least_traffic_for_the_papers_model() -> None:
    # The paper: 0.56 M numbers of fp32 per micro-batch, M = 2*R*D*L, at width 6144: 3440 MiB.
    paper = ["--gpu", "rtx-3090", "--host-mem", "64GB", "--adapter-width", "6144", "--top-k", "64"]
    result = run(*paper, "--grad-accum", "32", "--objective", "traffic")
    assert result.exit_code == EXIT_DONE, result.output
    moved = Plan.load("plan.json").prediction.transfer.window_bytes(32) / 32
    assert moved <= 0.56 * 2 * 6144 * 4096 * 32 * 4 / 5
    assert "the widest adapter, moved with the fewest bytes, of" in result.stdout
    verbose = run(*paper, "--grad-accum", "32", "--objective", "traffic", "--verbose")
    assert "most adaptation capacity with least traffic of" in verbose.stdout
    assert re.search(r"K +ahead +routing +backward +ckpt +traffic +step", verbose.stdout)


def test_the_emulated_device_computes_in_fp32() -> None:
    run("--gpu-mem", "1GB", *SMALL)
    request = Plan.load("plan.json").request
    assert (request.weights_dtype, request.adapter_dtype, request.link) == ("fp32", "fp32", "emulated")


def test_a_picture_and_a_trace() -> None:
    result = run("--gpu-mem", "1GB", *SMALL, "--plot", "plan.png", "--trace", "trace.json")
    assert result.exit_code == EXIT_DONE, result.output
    assert Path("plan.png").read_bytes().startswith(b"\x89PNG")
    events = json.loads(Path("trace.json").read_text())["traceEvents"]
    ends = max(event["ts"] + event["dur"] for event in events if event["ph"] == "X")
    assert ends == pytest.approx(Plan.load("plan.json").prediction.timing.step_seconds * 1e6)
    assert result.stdout.rstrip().endswith("wrote plan.json\nwrote plan.png\nwrote trace.json")


def test_a_local_config_is_a_model() -> None:
    config = {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 100, "n_positions": 128}
    Path("mine").mkdir()
    Path("mine/config.json").write_text(json.dumps(config))
    small = ["--gpu", "emulated", "--gpu-mem", "64MiB", "--host-mem", "64MiB", "--seq-len", "32", "--max-slowdown", "9"]
    result = run("--model", "mine", *small)
    assert result.exit_code == EXIT_DONE, result.output
    request = Plan.load("plan.json").request
    assert request.model.name == "mine"
    assert Path(request.model_path or "").samefile("mine")
    assert f"--model {request.model_path}" in result.stdout


def test_a_batch_size_that_is_left_open_is_planned() -> None:
    result = run("--gpu-mem", "2GB", *SMALL, "--batch-size", "auto", "--grad-accum", "4", "--adapter-width", "256")
    assert result.exit_code == EXIT_DONE, result.output
    request = Plan.load("plan.json").request
    assert (request.batch_size * request.grad_accum, request.batch_size_basis) == (8, "planned")
    assert f"batch size: {request.batch_size} x {request.grad_accum} of 8 sequences (fit: 1, 2, 4, 8)" in result.stdout
    given = ["--batch-size", str(request.batch_size), "--grad-accum", str(request.grad_accum)]
    assert run("--gpu-mem", "2GB", *SMALL, *given, "--adapter-width", "256", "-o", "given.json").exit_code == EXIT_DONE
    by_hand, open_ = Plan.load("given.json"), Plan.load("plan.json")
    assert (by_hand.decision, by_hand.prediction) == (open_.decision, open_.prediction)
    assert "batch_size_basis" not in Path("given.json").read_text()


def test_only_a_plan_may_leave_the_batch_size_open() -> None:
    small = ["--model", "gpt2", "--gpu-mem", "8GB", "--batch-size", "auto"]
    assert "--batch-size auto: it goes with a plan" in refused("compare", *small)
    assert "'auto' is not a valid integer range" in refused("estimate", "--method", "lora", *small)
    assert "'many' is not a valid integer range or auto" in refused(*small[:-1], "many")


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "Give --gpu-mem (such as --gpu-mem 24GB), --gpu (such as --gpu rtx-3090)"),
        (["--gpu-mem", "foo"], "--gpu-mem: 'foo' is not a size; give a positive size such as 24GB"),
        (["--gpu-mem", "-1GB"], "--gpu-mem: '-1GB' is not a size"),
        (["--gpu-mem", "24"], "--gpu-mem: '24' is so many bytes; did you mean 24GB?"),
        (["--gpu-mem", "0"], "--gpu-mem: '0' is not above zero"),
        (["--gpu-mem", "9999999TB"], "more than 1 PiB"),
        (["--gpu-mem", "24GB", "--host-mem", "lots"], "--host-mem: 'lots' is not a size"),
        (["--gpu-mem", "24GB", "--model", "lama-7b"], "unknown model 'lama-7b'; did you mean llama-7b"),
        (["--gpu-mem", "24GB", "--model", "none/config.json"], "model none/config.json: no such file"),
        (["--gpu", "rtx-3900"], "unknown GPU 'rtx-3900'; did you mean rtx-3090"),
        (["--gpu-mem", "24GB", "--link", "pcie-9"], "unknown link 'pcie-9'"),
        (["--gpu-mem", "24GB", "--host", "toaster"], "unknown host 'toaster'"),
        (["--gpu-mem", "24GB", "--sparsity", "x"], "unknown sparsity profile 'x'"),
        (["--gpu", "rtx-3090", "--gpu-mem", "80GB"], "80.00 GiB is more than rtx-3090 has (24.00 GiB)"),
        (["--gpu-mem", "24GB", "--batch-size", "0"], "'--batch-size': 0 is not in the range 1<=x<="),
        (["--gpu-mem", "24GB", "--seq-len", "-5"], "'--seq-len': -5 is not in the range"),
        (["--gpu-mem", "24GB", "--seq-len", "4096"], "--seq-len 4096: llama-7b has 2048 positions"),
        (["--gpu-mem", "24GB", "--prefetch-depth", "32"], "--prefetch-depth 32: llama-7b has 32 layers"),
        (["--gpu-mem", "24GB", "--top-k", "9", "--adapter-width", "8"], "--top-k 9: there are 8 rows"),
        (["--gpu-mem", "24GB", "--max-slowdown", "nan"], "'--max-slowdown': nan is not a finite number"),
        (["--gpu-mem", "24GB", "--max-slowdown", "0.5"], "'--max-slowdown': 0.5 is not in the range"),
        (["--gpu-mem", "24GB", "--min-trainable", "10"], "'--min-trainable': 10.0 is not in the range"),
        (["--gpu-mem", "24GB", "--objective", "fun"], "'fun' is not one of 'capacity', 'speed', 'traffic'"),
        (["--gpu-mem", "24GB", "--weights-dtype", "int8"], "'int8' is not one of 'fp32', 'bf16', 'nf4'"),
        (["--gpu-mem", "24GB", "--double-quant"], "--double-quant: the weights are bf16"),
        (["--gpu", "emulated"], "GPU emulated has no memory of its own"),
        (["--gpu", "emulated", "--gpu-mem", "1GB", "--attention", "flash"], "it needs a CUDA device"),
        (["--gpu-mem", "24GB", "--plot", "plan.jpeg"], "must end in one of .png, .svg, .pdf"),
        (["--gpu-mme", "24GB"], "no such option --gpu-mme; did you mean --gpu-mem"),
        (["comapre"], "unknown command 'comapre'; did you mean compare"),
        (["audit", "none.json", "none.json"], "plan none.json: no such file"),
        (["audit", "none.json"], "Missing argument 'REPORT'"),
        (["estimate", "--method", "lore"], "method: no such method; there are meft, "),
        (["--gpu-mem", "24GB", "--tokens", "many"], "--tokens: 'many' is not a count; give a whole number above zero"),
        (["--gpu-mem", "24GB", "--tokens", "0"], "--tokens: '0' is not between 1 and 10^15"),
    ],
)
def test_bad_input_is_one_clear_line(arguments: list[str], says: str) -> None:
    assert says in refused(*arguments)
    assert not Path("plan.json").exists()


def test_an_output_that_cannot_be_written() -> None:
    Path("taken").write_text("")
    assert "-o taken/plan.json: cannot be written" in refused("--gpu-mem", "1GB", *SMALL, "-o", "taken/plan.json")


def test_an_unexpected_error_is_one_line_and_debugging_shows_where(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("two\nlines")

    monkeypatch.setattr("meft.planner.front.plan.make_plan", broken)
    line = refused("--gpu-mem", "24GB", exit_code=EXIT_UNEXPECTED)
    assert line == "meft-plan: unexpected RuntimeError: two lines (MEFT_DEBUG=1 shows where)"
    monkeypatch.setenv("MEFT_DEBUG", "1")
    assert isinstance(run("--gpu-mem", "24GB").exception, RuntimeError)


# --- nothing fits ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ["--gpu", "rtx-3060-12gb", "--host-mem", "64GB"],
        ["--gpu-mem", "24GB", "--host-mem", "100MB"],
        ["--gpu-mem", "500MB", *SMALL, "--no-activation-checkpointing"],
        ["--gpu-mem", "1GB", *SMALL, "--adapter-width", "8192", "--max-slowdown", "1.01"],
    ],
    ids=["device", "host", "flags", "slowdown"],
)
def test_infeasible_prints_a_command_that_works(arguments: list[str]) -> None:
    line = refused(*arguments, exit_code=EXIT_INFEASIBLE)
    assert line.startswith("meft-plan: no plan fits: ")
    nearest = shlex.split(line.split("the nearest that fits: ")[1])
    assert nearest[0] == "meft-plan"
    named = [word for word in nearest if word.startswith("--")]
    assert len(named) == len(set(named))  # changed, not repeated
    assert {word for word in arguments if word.startswith("--")} <= {*named, "--no-activation-checkpointing"}
    result = run(*nearest[1:])
    assert result.exit_code == EXIT_DONE, result.output
    Plan.load("plan.json")


def test_infeasible_as_json() -> None:
    result = run("--gpu-mem", "24GB", "--host-mem", "100MB", "--json", "-o", "my plan.json")
    assert result.exit_code == EXIT_INFEASIBLE
    verdict = json.loads(result.stdout)
    assert (verdict["feasible"], verdict["binding"], verdict["limit"]) == (
        False,
        "host memory",
        50 << 20,
    )  # half of so little is left to all else
    assert verdict["needed"] > verdict["limit"]
    assert shlex.split(verdict["command"])[-2] == "--host-mem"
    assert "-o 'my plan.json'" in verdict["command"]
    assert "--json" in verdict["command"]
    assert not Path("my plan.json").exists()


# --- defaults -------------------------------------------------------------------------------------------------------


def options(**given: Any) -> RequestOptions:
    names = ("model", "gpu", "gpu_mem", "host", "link", "sparsity", "weights_dtype", "double_quant", "adapter_dtype")
    fields = dict.fromkeys((*names, "activation_checkpointing"), None) | {"host_mem": 64 * GIB}
    workload = {"batch_size": 2, "seq_len": 256, "grad_accum": 32, "attention": "sdpa"}
    return RequestOptions.taken_from(fields | workload | given)


def test_a_card_alone_has_what_nvml_reports() -> None:
    planned = planning(options(gpu="rtx-4090"))
    assert planned.request.gpu_mem_bytes == load_gpu("rtx-4090").total_bytes
    assert planned.profiles.link.key == load_gpu("rtx-4090").link


def test_the_box_may_say_a_little_more_than_nvml() -> None:
    total = load_gpu("rtx-4090").total_bytes
    assert total < 24 * GIB
    planned = planning(options(gpu="NVIDIA GeForce RTX 4090", gpu_mem=24 * GIB))
    assert (planned.request.gpu, planned.request.gpu_mem_bytes) == ("rtx-4090", total)
    assert any("NVML's total" in note for note in planned.notes)
    assert planning(options(gpu="rtx-4090", gpu_mem=12 * GIB)).request.gpu_mem_bytes == 12 * GIB


def test_the_stand_in_card_holds_the_budget() -> None:
    largest = max(load_gpu(name).total_bytes for name in gpu_names() if name != "emulated")
    for budget in (GIB, 24 * GIB, 32 * GIB, 48 * GIB, 80 * GIB):
        assert default_gpu(budget).total_bytes * 1.1 >= budget
    assert default_gpu(8 * GIB).key == default_gpu(24 * GIB).key == "rtx-3090"
    assert default_gpu(1000 * GIB).total_bytes == largest


def test_without_host_mem_it_is_this_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(front_request, "machine_memory_bytes", lambda: 10 * GIB)
    planned = planning(options(gpu="rtx-3090", host_mem=None))
    assert (planned.request.host_mem_bytes, planned.request.host_mem_basis) == (10 * GIB, "this machine")
    assert host_budget_bytes(planned.request) == 8 * GIB
    assert any("this machine's RAM, 10.00 GiB, less 2.00 GiB for all else" in note for note in planned.notes)
    emulated = planning(options(gpu="emulated", gpu_mem=4 * GIB, host_mem=None))
    assert emulated.request.host_mem_bytes == 6 * GIB  # the emulated device lives in the same RAM
    assert any("10.00 GiB, less 4.00 GiB for the emulated device, less 2.00" in note for note in emulated.notes)
    line = refused("--gpu", "emulated", "--gpu-mem", "10GB", "--model", "gpt2")
    assert "lives in this machine's RAM, which has 8.00 GiB to spare" in line
    monkeypatch.setattr(front_request, "machine_memory_bytes", lambda: 2 * GIB)
    assert host_budget_bytes(planning(options(gpu="rtx-3090", host_mem=None)).request) == GIB


def test_a_profile_of_ones_own(tmp_path: Path) -> None:
    profile = load_gpu("rtx-3090").model_copy(update={"key": "mine"})
    (tmp_path / "mine.json").write_text(profile.canonical_json())
    planned = planning(options(gpu="mine.json"))
    assert (planned.profiles.gpu.key, planned.request.gpu) == ("mine", "mine.json")


def test_a_profile_with_nan_is_refused(tmp_path: Path) -> None:
    text = load_gpu("rtx-3090").canonical_json().replace("0.85", "NaN", 1)
    assert "NaN" in text
    (tmp_path / "mine.json").write_text(text)
    assert "NaN is not a finite number" in refused("--gpu", "mine.json")


# --- estimate and compare -------------------------------------------------------------------------------------------


def estimated(*arguments: str) -> dict[str, Any]:
    result = run("estimate", *arguments, "--json")
    content: dict[str, Any] = json.loads(result.stdout)
    assert result.exit_code == (EXIT_DONE if content["fits"] else EXIT_INFEASIBLE), result.output
    assert result.stderr == ""
    return content


MISTRAL = ["--model", "mistral-7b", "--batch-size", "2", "--seq-len", "2048", "--gpu-mem", "24GB", "--host-mem", "64GB"]


def test_an_estimate_answers_the_commonest_question_as_compare_does() -> None:
    result = run("estimate", "--method", "qlora", *MISTRAL)
    assert result.exit_code == EXIT_DONE, result.output
    assert "fits              yes: 10.06 GiB" in result.stdout
    assert "checkpointing: on, chosen as compare does: without it 47.29 GiB" in result.stdout
    assert "sdpa attention, no dropout, nf4 weights, fp32 adapter: chosen as compare does" in result.stdout
    shallow = str(shallow_model(Path("shallow")))
    small = ["--model", shallow, "--seq-len", "2048", "--gpu-mem", "4.5GB", "--host-mem", "64GB"]
    content = estimated("--method", "qlora", *small)
    assert content["activation_checkpointing"]
    compared = json.loads(run("compare", *small, "--grad-accum", "1", "--json").stdout)
    usual = {row["method"]: row["usual"] for row in compared["rows"]}["qlora"]
    assert {name: value for name, value in content.items() if name != "chosen"} == {
        name: value for name, value in usual.items() if name != "chosen"
    }


def test_a_no_exits_3_with_and_without_json() -> None:
    asked = ["estimate", "--method", "qlora", *MISTRAL, "--no-activation-checkpointing"]
    result = run(*asked)
    assert result.exit_code == EXIT_INFEASIBLE
    assert "no: 47.29 GiB, 24.94 GiB above 22.35 GiB for the allocator" in result.stdout
    assert "checkpointing: " not in result.stdout  # nothing was left open about it
    as_json = run(*asked, "--json")
    assert as_json.exit_code == EXIT_INFEASIBLE
    assert json.loads(as_json.stdout)["fits"] is False


def test_checkpointing_is_left_out_where_it_fits_without() -> None:
    content = estimated("--method", "lora", "--model", "qwen2.5-0.5b", "--gpu-mem", "24GB")
    assert not content["activation_checkpointing"]
    assert content["chosen"][0] == "checkpointing: off, chosen as compare does: it fits without"
    said = ["--no-activation-checkpointing", "--attention", "sdpa", "--lora-dropout", "0", "--weights-dtype", "bf16"]
    every = estimated("--method", "lora", "--model", "qwen2.5-0.5b", *said, "--adapter-dtype", "fp32")
    assert every["chosen"] == []


def test_meft_is_estimated_with_checkpointing_where_it_needs_it() -> None:
    sizes = [
        "--method",
        "meft",
        "--model",
        "llama-7b",
        "--adapter-width",
        "2048",
        "--top-k",
        "64",
        "--host-mem",
        "64GB",
    ]
    workload = ["--batch-size", "4", "--seq-len", "512"]
    content = estimated(*sizes, *workload, "--gpu-mem", "18GB")
    assert content["fits"]
    assert content["activation_checkpointing"]
    assert "checkpointing: on, chosen as compare does: without it" in content["chosen"][0]
    assert not estimated(*sizes, *workload, "--gpu-mem", "40GB")["activation_checkpointing"]


def test_the_emulated_device_is_estimated_in_fp32_as_compare_does() -> None:
    small = ["--model", "smollm2-135m", "--gpu", "emulated", "--gpu-mem", "4GB", "--host-mem", "8GB", "--seq-len", "64"]
    assert estimated("--method", "lora", *small)["weights_dtype"] == "fp32"
    assert estimated("--method", "lora", *small, "--weights-dtype", "bf16")["weights_dtype"] == "bf16"


@pytest.mark.parametrize("method", ["meft", "parallel-adapter", "lora", "qlora", "full"])
def test_every_method_has_an_estimate(method: str) -> None:
    content = estimated("--method", method, "--model", "qwen2.5-0.5b", "--host-mem", "64GB")
    assert content["method"] == method
    assert content["resident_bytes"] < content["peak_allocated_bytes"] < content["peak_reserved_bytes"]
    assert content["process_bytes"]["low_bytes"] < content["process_bytes"]["high_bytes"]
    assert all(entry["because"] and entry["basis"] for entry in content["entries"])
    assert content["leaves_out"]
    assert not Path("plan.json").exists()


def test_estimate_takes_its_configuration() -> None:
    content = estimated(
        *("--method", "lora", "--rank", "8", "--target-modules", "q_proj,v_proj", "--model", "qwen2.5-0.5b"),
        *("--weights-dtype", "fp16", "--activation-checkpointing", "--adapter-dtype", "bf16"),
    )
    assert (content["size"], content["targets"], content["weights_dtype"]) == (8, ["q_proj", "v_proj"], "fp16")
    assert (content["activation_checkpointing"], content["adapter_dtype"]) == (True, "bf16")
    # D = 896, 14 heads of 64 and 2 key-value heads, 24 layers: 8 * ((896 + 896) + (896 + 128)) * 24
    assert content["trainable_parameters"] == 8 * (1792 + 1024) * 24


def test_estimate_of_meft_takes_a_decision_and_does_not_ask_whether_it_fits() -> None:
    fixed = ["--adapter-width", "2048", "--top-k", "16", "--prefetch-depth", "1", "--routing", "exact"]
    content = estimated("--method", "meft", *fixed, "--gpu-mem", "2GB", "--host-mem", "1GB")
    decision = content["decision"]
    assert (decision["adapter_width"], decision["top_k"], decision["routing"]) == (2048, 16, "exact")
    assert not content["fits"]
    assert content["allocator_budget_bytes"] < 2 * GIB


def test_qlora_is_lora_on_nf4() -> None:
    same = ["--rank", "16", "--target-modules", "q,v", "--model", "qwen2.5-0.5b"]
    qlora = estimated("--method", "qlora", *same, "--no-double-quant")
    lora = estimated("--method", "lora", *same, "--weights-dtype", "nf4")
    assert qlora["entries"] == lora["entries"]
    assert qlora["weights_dtype"] == "nf4"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--method", "full", "--rank", "8"], "--rank does not go with --method full; it is of lora, qlora"),
        (["--method", "lora", "--top-k", "8"], "--top-k does not go with --method lora; it is of meft"),
        (["--method", "meft", "--keep-outputs"], "--keep-outputs does not go with --method meft"),
        (["--method", "qlora", "--weights-dtype", "bf16"], "qlora has nf4 weights"),
        (["--method", "full", "--weights-dtype", "nf4"], "full trains its weights"),
        (["--method", "lora", "--target-modules", "qq"], "unknown linear layer in --target-modules 'qq'"),
        (["--method", "meft", "--autocast", "bf16"], "--autocast does not go with --method meft; it is of"),
        (["--method", "full", "--kbit-preparation"], "--kbit-preparation does not go with --method full"),
        (["--method", "lora", "--double-quant"], "it goes with --weights-dtype nf4"),
        (["--method", "lora", "--weights-dtype", "fp32", "--attention", "flash"], "it computes in 16 bits"),
        (["--method", "lora", "--weights-dtype", "int8"], "'int8' is not one of"),
        ([], "--method: which one? Give one of meft"),
        (["--method", "meft", "--adapter-width", "64", "--top-k", "8", "--active-rows", "65"], "--active-rows 65"),
    ],
)
def test_an_estimate_refuses_what_does_not_go_together(arguments: list[str], says: str) -> None:
    assert says in refused("estimate", *arguments)


@pytest.mark.parametrize(
    "request_fields",
    [
        {"method": "full", "kbit_preparation": False, "lora_dropout": 0, "adapter_dtype": "fp32", "hot_rows": 0},
        {"method": "lora", "prefetch_depth": 0, "bf16_copy": False},
        {"method": "meft", "autocast": "none", "optimizer": "adamw", "loss": "hf", "keep_outputs": False},
        {"method": "meft", "adapter_width": 64, "top_k": 8, "kbit_preparation": False, "padding": False},
    ],
)
def test_an_explicit_default_is_no_contradiction(request_fields: dict[str, object]) -> None:
    request = {"model": "qwen2.5-0.5b", "gpu_mem": "24GB", "host_mem": "64GB", **request_fields}
    Path("request.json").write_text(json.dumps(request))
    bare = {name: request[name] for name in ("model", "gpu_mem", "host_mem", "method")}
    bare |= {name: value for name, value in request_fields.items() if name in ("adapter_width", "top_k")}
    Path("bare.json").write_text(json.dumps(bare))
    assert estimated("--request", "request.json") == estimated("--request", "bare.json")


REQUEST = {
    "method": "qlora",
    "model": "qwen2.5-0.5b",
    "rank": 8,
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "kbit_preparation": True,
    "autocast": "bf16",
    "batch_size": 1,
    "seq_len": 256,
    "activation_checkpointing": True,
    "gpu": "rtx-4080",
    "gpu_mem": "16GB",
}


def test_estimate_takes_one_json_object_as_file_or_standard_input() -> None:
    Path("request.json").write_text(json.dumps(REQUEST))
    options = ["--method", "qlora", "--model", "qwen2.5-0.5b", "--rank", "8", "--target-modules", "q,k,v,o"]
    options += ["--kbit-preparation", "--autocast", "bf16", "--batch-size", "1", "--seq-len", "256"]
    by_options = estimated(*options, "--activation-checkpointing", "--gpu", "rtx-4080")
    assert estimated("--request", "request.json") == by_options
    piped = CliRunner().invoke(command, ["estimate", "--request", "-", "--json"], input=json.dumps(REQUEST))
    assert json.loads(piped.stdout) == by_options
    # canifinetune-01215 measured 1,600,626,937 bytes on an RTX 4080
    assert by_options["peak_allocated_bytes"] == pytest.approx(1600626937, rel=0.002)
    assert estimated("--request", "request.json", "--seq-len", "512")["peak_allocated_bytes"] > 2_000_000_000


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"method": "lora", "rnk": 8}', "unknown field in --request request.json 'rnk'; did you mean rank"),
        ('{"method": "lora", "rank": 0}', "rank: Input should be greater than or equal to 1"),
        ('{"method": "lora", "rank": "eight"}', "rank: Input should be a valid integer"),
        ('{"method": "lore"}', "method: no such method; there are meft, "),
        ('{"rank": 8}', "--method: which one?"),
        ('["lora"]', "expected a JSON object, found list"),
        ('{"method": "lora", ', "not valid JSON"),
        ('{"method": "lora", "gpu_mem": "lots"}', "--gpu-mem: 'lots' is not a size"),
    ],
)
def test_a_bad_request_is_one_clear_line(content: str, says: str) -> None:
    Path("request.json").write_text(content)
    assert says in refused("estimate", "--request", "request.json")


def test_estimate_verify_traces_the_real_model(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    config = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    config |= {"num_attention_heads": 4, "vocab_size": 1000, "max_position_embeddings": 64}
    (tmp_path / "config.json").write_text(json.dumps(config))
    workload = ["--model", str(tmp_path), "--batch-size", "2", "--seq-len", "64"]
    for method in (["--method", "lora"], ["--method", "meft", "--adapter-width", "64", "--top-k", "8"]):
        content = estimated(*method, *workload, "--verify")
        assert content["peak_allocated_bytes"] == pytest.approx(content["traced"]["peak_allocated_bytes"], rel=0.01)
    assert estimated("--method", "lora", *workload)["traced"] is None


def test_estimate_of_meft_with_its_active_rows_given() -> None:
    sizes = ["--adapter-width", "2048", "--top-k", "16", "--model", "qwen2.5-0.5b"]
    few = estimated("--method", "meft", *sizes, "--active-rows", "100", "--autocast", "none", "--loss", "hf")
    many = estimated("--method", "meft", *sizes, "--active-rows", "1000")
    assert few["decision"]["active_rows_cap"] == 100
    assert few["peak_allocated_bytes"] < many["peak_allocated_bytes"]
    assert few["h2d_bytes_per_step"] < many["h2d_bytes_per_step"]


def test_estimate_of_meft_with_a_bf16_copy_of_the_rows() -> None:
    sizes = ["--adapter-width", "2048", "--top-k", "16", "--model", "qwen2.5-0.5b"]
    plain, copied = estimated("--method", "meft", *sizes), estimated("--method", "meft", *sizes, "--bf16-copy")
    assert copied["host_bytes"] - plain["host_bytes"] == 24 * 2048 * 2 * 896 * 2  # L, R, key and value, D, bytes
    assert "--bf16-copy does not go with --method lora" in refused("estimate", "--method", "lora", "--bf16-copy")


def test_a_target_of_another_architecture_is_passed_over_and_said() -> None:
    result = run("estimate", "--method", "lora", "--model", "qwen2.5-0.5b", "--target-modules", "q_proj,c_attn")
    assert "target c_attn: qwen2.5-0.5b has no such layer" in " ".join(result.stdout.split())


def test_compare_shows_every_method_and_writes_no_plan() -> None:
    result = run("compare", "--model", str(shallow_model(Path("shallow"))), "--gpu-mem", "4GB", "--host-mem", "64GB")
    assert result.exit_code == EXIT_DONE, result.output
    for method in ("meft", "parallel-adapter", "lora", "qlora", "full"):
        assert result.stdout.count(f"\n  {method} ") == 2  # at the usual size, and at the largest
    assert not Path("plan.json").exists()


def test_compare_shows_the_same_configurations_at_every_budget() -> None:
    shown = []
    for budget in ("2GB", "24GB"):
        small = [
            "--model",
            str(shallow_model(Path("shallow"))),
            "--gpu-mem",
            budget,
            "--host-mem",
            "64GB",
            "--top-k",
            "64",
        ]
        rows = json.loads(run("compare", *small, "--json").stdout)["rows"]
        configurations = {row["method"]: row["usual_configurations"] for row in rows}
        assert all(len(each) == 2 for each in configurations.values())
        for row in rows:
            fitting = [each for each in row["usual_configurations"] if each["fits"]]
            assert row["usual"]["fits"] == bool(fitting)
            assert row["usual"] in row["usual_configurations"]
        kept = ("size", "activation_checkpointing", "decision", "peak_reserved_bytes", "host_bytes", "step_seconds")
        shown.append({name: [[one[key] for key in kept] for one in each] for name, each in configurations.items()})
        fits = {name: [one["fits"] for one in each] for name, each in configurations.items()}
        assert fits["full"] == [budget == "24GB"] * 2
    assert shown[0] == shown[1]


def test_compare_as_json_says_what_binds_where_meft_does_not_fit() -> None:
    small = ["--model", str(shallow_model(Path("shallow"))), "--gpu-mem", "4GB", "--host-mem", "8MB"]
    result = run("compare", *small, "--json")
    rows = {row["method"]: row for row in json.loads(result.stdout)["rows"]}
    assert rows["meft"]["largest"] is None
    assert rows["meft"]["largest_because"].startswith("host memory: ")
    assert not rows["meft"]["usual"]["fits"]
    assert rows["lora"]["largest"]["size"] > rows["lora"]["usual"]["size"]


# --- audit ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def audited_files() -> list[str]:
    plan = sample_plan()
    plan.save("p.json")
    sample_report(plan).save("r.json")
    return ["audit", "p.json", "r.json"]


def test_an_audit_passes_with_0_and_fails_with_1(audited_files: list[str]) -> None:
    passed = run(*audited_files)
    assert passed.exit_code == EXIT_DONE, passed.output
    assert "PASSED" in passed.stdout
    plan = Plan.load("p.json")
    counted = sample_report(plan).observed.transfer.d2h_bytes_total
    sample_report(plan, d2h_bytes_total=counted + 1).save("r.json")
    failed = run(*audited_files)
    assert failed.exit_code == EXIT_UNEXPECTED
    assert "FAILED: d2h_bytes_given_rows missed" in failed.stdout


def test_an_audit_as_json(audited_files: list[str]) -> None:
    content = json.loads(run(*audited_files, "--json").stdout)
    assert content["passed"]
    assert content["transfer_exact"]
    assert content["plan_digest"] == sample_plan().content_digest()
    row = next(row for row in content["rows"] if row["quantity"] == "h2d_bytes_given_rows")
    assert row["predicted"] == row["observed"]


def test_an_audit_takes_tolerances(audited_files: list[str]) -> None:
    assert run(*audited_files, "--tolerance", "step_seconds=0").exit_code == EXIT_UNEXPECTED
    assert "unknown quantity in --tolerance 'speed'" in refused(*audited_files, "--tolerance", "speed=0.1")


def test_an_audit_refuses_the_report_of_another_plan(audited_files: list[str]) -> None:
    sample_plan(grad_accum=3).save("p.json")
    assert "not of this one" in refused(*audited_files)


def test_an_edited_plan_is_refused(audited_files: list[str]) -> None:
    text = Path("p.json").read_text()
    Path("p.json").write_text(text.replace('"adapter_width": 16', '"adapter_width": 32'))
    assert "plan p.json: its digest does not match its content" in refused(*audited_files)
    Path("p.json").write_text(text[: len(text) // 2])
    assert "is it truncated?" in refused(*audited_files)


# --- as processes ---------------------------------------------------------------------------------------------------

_LOADED = """
import os, sys
from meft.planner.cli.main import main
os._exit = sys.exit  # so that it comes to the question
try:
    main()
except SystemExit as end:
    assert end.code in (None, 0), end.code
print(*sorted(sys.modules), file=sys.stderr)
"""


def loaded_by(arguments: list[str]) -> set[str]:
    """Modules that the command has loaded when it is done."""
    done = subprocess.run([sys.executable, "-c", _LOADED, *arguments], capture_output=True, text=True, check=True)
    return set(done.stderr.split())


def test_a_plan_loads_nothing_that_it_does_not_need():
    # the simulated step and the allocator are needed: what is reserved is the one replayed through the other
    others = {f"meft.planner.{name}" for name in ("search.weighing", "search.infeasible", "records.profile_file")}
    others |= {"meft.planner.predict.verification", "meft.planner.render.plot"}
    assert not loaded_by(["--gpu-mem", "24GB", "--host-mem", "64GB"]) & (others | {"numpy.ma"})


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["--gpu-mem", "24GB", "--host-mem", "64GB"], ["compare", "--help"]]
)
def test_a_start_loads_nothing_heavy(arguments: list[str]) -> None:
    loaded = {name.partition(".")[0] for name in loaded_by(arguments)}
    assert not loaded & {"torch", "transformers", "numba", "scipy", "matplotlib"}
    assert "click" in loaded


def meft_plan(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    program = [str(Path(sys.executable).with_name("meft-plan")), *arguments]
    return subprocess.run(program, capture_output=True, text=True, check=False, env=os.environ | environment)


def test_help_names_planning_and_the_commands() -> None:
    done = meft_plan("--help")
    assert done.returncode == EXIT_DONE
    for text in ("--gpu-mem SIZE", "GB = GiB = 2^30 bytes", "estimate", "compare", "audit", "Exit codes: 0 done"):
        assert text in done.stdout


def test_the_installed_program_plans_and_refuses() -> None:
    done = meft_plan("--gpu-mem", "1GB", *SMALL)
    assert (done.returncode, done.stderr) == (EXIT_DONE, "")
    assert "\x1b" not in done.stdout  # piped: no colours
    plan = Plan.load("plan.json")
    again = make_plan(plan.request, planning(_options_of(plan)).profiles, meft_version=plan.meft_version)
    assert again == plan
    bad = meft_plan("--gpu-mem", "foo")
    assert (bad.returncode, bad.stdout) == (EXIT_USAGE, "")
    assert bad.stderr.startswith("meft-plan: --gpu-mem: 'foo' is not a size")
    assert meft_plan("--gpu-mem", "24GB", "--host-mem", "100MB").returncode == EXIT_INFEASIBLE


def _options_of(plan: Plan) -> RequestOptions:
    request = plan.request
    return options(model=request.model.name, gpu=request.gpu, gpu_mem=request.gpu_mem_bytes, seq_len=request.seq_len)


def test_fused_lora_and_repeated_heads_are_refused_where_there_are_none() -> None:
    without = refused("estimate", "--method", "full", "--model", "smollm2-135m", "--kernels", "lora")
    assert "--kernels lora: --method full trains no LoRA" in without
    ungrouped = refused("estimate", "--method", "lora", "--model", "llama-7b", "--repeated-heads")
    assert "--repeated-heads: sdpa attention of llama-7b has no grouped heads" in ungrouped


def test_activations_on_the_host_are_in_its_ledger_its_traffic_and_its_time() -> None:
    base = ("estimate", "--method", "lora", "--model", "smollm2-135m", "--gpu", "rtx-3090", "--seq-len", "256")
    base += ("--no-activation-checkpointing", "--json")
    found = {name: json.loads(run(*base, "--offload", name).output) for name in ("none", "save-on-cpu", "trl")}
    plain = found["none"]
    assert plain["host_bytes"] == 0
    for name in ("save-on-cpu", "trl"):
        assert [entry["category"] for entry in found[name]["host_entries"]] == ["offloaded_activations"]
        assert found[name]["host_bytes"] == found[name]["host_entries"][0]["num_bytes"] > 0
        assert found[name]["d2h_bytes_per_step"] > plain["d2h_bytes_per_step"]
        assert found[name]["peak_allocated_bytes"] < plain["peak_allocated_bytes"]
    assert found["save-on-cpu"]["step_seconds"] > found["trl"]["step_seconds"] >= plain["step_seconds"]
    assert "leave --no-reentrant out" in refused(*base[:-1], "--offload", "unsloth", "--no-reentrant")
