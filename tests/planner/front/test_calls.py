"""The calls of ``import meft`` beside the commands: the same answers, the same refusals."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from plan_samples import sample_plan, sample_report, shallow_model

import meft
from meft.planner.cli.estimate import estimate_command
from meft.planner.cli.main import command
from meft.planner.cli.plan import plan_command
from meft.planner.front.arguments import EstimateArguments, PlanArguments, argument_names, call_with
from meft.planner.front.asked import EstimateRequest
from meft.planner.front.options import RequestOptions

GIB = 1 << 30
SMALL: dict[str, Any] = {
    "model": "smollm2-135m",
    "gpu": "emulated",
    "gpu_mem": "1GB",
    "host_mem": "4GB",
    "seq_len": 64,
    "top_k": 32,
}


@pytest.fixture(autouse=True)
def _in_a_new_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def options_of(arguments: dict[str, Any]) -> list[str]:
    """The arguments as they are typed at a command."""
    words = []
    for name, value in arguments.items():
        option = name.replace("_", "-")
        words += [f"--{'' if value else 'no-'}{option}"] if isinstance(value, bool) else [f"--{option}", str(value)]
    return words


def commanded(*words: str) -> Any:
    """What a command prints as JSON."""
    result = CliRunner().invoke(command, [*words, "--json"])
    assert result.stdout, result.stderr
    return json.loads(result.stdout)


def refusal(*words: str) -> str:
    """The one line of a command that refuses, without its program's name and where to read on."""
    result = CliRunner().invoke(command, list(words))
    assert result.exit_code in (2, 3), result.output
    return result.stderr.strip().removeprefix("meft-plan: ")


def of(record: Any) -> Any:
    return json.loads(record.model_dump_json())


# --- the same answers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        SMALL,
        {"gpu_mem": "24GB", "host_mem": "64GB"},
        SMALL | {"objective": "speed", "min_trainable": 0.05, "activation_checkpointing": True, "bf16_copy": False},
    ],
)
def test_a_plan_is_the_one_that_the_command_writes(arguments: dict[str, Any]) -> None:
    commanded(*options_of(arguments))
    assert meft.plan(**arguments) == meft.load_plan("plan.json")


@pytest.mark.parametrize(
    ("method", "arguments"),
    [
        ("lora", {"rank": 8, "target_modules": "q_proj,v_proj", "model": "qwen2.5-0.5b", "gpu_mem": "8GB"}),
        ("qlora", {"model": "qwen2.5-0.5b", "batch_size": 1, "activation_checkpointing": True, "double_quant": False}),
        ("meft", SMALL | {"adapter_width": 1024, "active_rows": 100}),
        ("meft", SMALL | {"adapter_width": 1024, "adapter_dtype": "bf16", "bf16_copy": True}),
    ],
)
def test_an_estimate_is_the_commands(method: Any, arguments: dict[str, Any]) -> None:
    assert of(meft.estimate(method, **arguments)) == commanded("estimate", "--method", method, *options_of(arguments))


def test_a_comparison_is_the_commands() -> None:
    small = SMALL | {"model": str(shallow_model(Path("shallow")))}
    assert of(meft.compare(**small)) == commanded("compare", *options_of(small))


def test_an_audit_is_the_commands() -> None:
    plan = sample_plan()
    report = sample_report(plan)
    plan.save("p.json")
    report.save("r.json")
    expected = commanded("audit", "p.json", "r.json")
    assert of(meft.audit(plan, report)) == expected
    assert of(meft.audit("p.json", Path("r.json"))) == expected
    assert meft.load_report("r.json") == report
    strict = commanded("audit", "p.json", "r.json", "--tolerance", "step_seconds=0")
    assert of(meft.audit(plan, report, tolerance={"step_seconds": 0})) == strict
    assert not meft.audit(plan, report, tolerance={"step_seconds": 0}).passed
    assert of(meft.audit(plan, report, tolerance=0)) == commanded("audit", "p.json", "r.json", "--tolerance", "0")


def test_sizes_paths_and_numbers_are_taken_as_people_have_them(tmp_path: Path) -> None:
    text = meft.plan(**SMALL)
    assert meft.plan(**SMALL | {"gpu_mem": GIB, "host_mem": np.int64(4 * GIB), "top_k": np.int64(32)}) == text
    folder = tmp_path / "model"
    folder.mkdir()
    config = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    config |= {"num_attention_heads": 4, "vocab_size": 1000, "max_position_embeddings": 64}
    (folder / "config.json").write_text(json.dumps(config))
    assert meft.plan(**SMALL | {"model": folder}).request.model_path == str(folder.resolve())
    assert meft.estimate("lora", target_modules=["q_proj"], model=folder, seq_len=64).targets == ("q_proj",)


# --- the same refusals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"gpu_mem": "foo"},
        {"gpu_mem": 24},
        {"gpu_mem": "24GB", "seq_len": 4096},
        {"gpu_mem": "24GB", "model": "lama-7b"},
        {"gpu_mem": "48GB", "gpu": "rtx-3090"},
        {"gpu_mem": "24GB", "double_quant": True},
        {"gpu_mem": "24GB", "top_k": 64, "adapter_width": 32},
        {"gpu_mem": "24GB", "host": "none.json"},
    ],
)
@pytest.mark.parametrize("call", [meft.plan, meft.compare])
def test_a_call_refuses_in_the_commands_words(call: Callable[..., Any], arguments: dict[str, Any]) -> None:
    said = refusal(call.__name__, *options_of(arguments))
    with pytest.raises(meft.UsageError) as caught:
        call(**arguments)
    assert str(caught.value) == argument_names(said)
    assert "--" not in str(caught.value)


def test_a_refused_estimate_is_the_commands() -> None:
    said = refusal("estimate", "--method", "lora", "--top-k", "3")
    with pytest.raises(meft.UsageError) as caught:
        meft.estimate("lora", top_k=3)
    assert str(caught.value) == argument_names(said)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"gpu_memory": "24GB"}, "unknown argument 'gpu_memory'; did you mean gpu_mem"),
        ({"gpu_mem": "24GB", "batch_size": 0}, r"batch_size: .* greater than or equal to 1 \(got 0\)"),
        ({"gpu_mem": "24GB", "batch_size": 2.5}, r"batch_size: .* integer \(got 2.5\)"),
        ({"gpu_mem": "24GB", "batch_size": True}, r"batch_size: .* integer \(got True\)"),
        ({"gpu_mem": "24GB", "weights_dtype": "bf17"}, "weights_dtype: Input should be 'fp32'.*got 'bf17'"),
        ({"gpu_mem": "24GB", "weights_dtype": "fp16"}, "weights_dtype fp16: the runtime trains beside"),
        ({"gpu_mem": "24GB", "max_slowdown": float("nan")}, "max_slowdown: "),
        ({"gpu_mem": "24GB", "adapter_width": -1, "hot_rows": -1}, "adapter_width: .*; hot_rows: "),
        ({"gpu_mem": True}, "gpu_mem: 'True' is not a size"),
    ],
)
def test_a_wrong_argument_is_one_line_that_names_it(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(meft.UsageError, match=says) as caught:
        meft.plan(**arguments)
    assert "\n" not in str(caught.value)


def test_other_calls_name_their_arguments_too() -> None:
    with pytest.raises(meft.UsageError, match="estimate: method: no such method; there are meft"):
        meft.estimate("loora")  # type: ignore[arg-type]
    with pytest.raises(meft.UsageError, match="unknown argument 'rnk'; did you mean rank"):
        meft.estimate("lora", rnk=3)  # type: ignore[call-arg]
    with pytest.raises(meft.UsageError, match=r"plan x\.json: no such file"):
        meft.load_plan("x.json")
    with pytest.raises(meft.UsageError, match="tolerance step_seconds=-1: -1 is not a fraction"):
        meft.audit("p.json", "r.json", tolerance={"step_seconds": -1})


def test_an_infeasible_request_raises_with_the_verdict_and_a_call_that_works() -> None:
    tight = SMALL | {"gpu_mem": "600MB"}
    content = commanded(*options_of(tight))
    with pytest.raises(meft.InfeasibleError, match="no plan fits: device memory: the nearest needs") as caught:
        meft.plan(**tight)
    verdict = caught.value.verdict
    assert isinstance(verdict, meft.Infeasible)
    assert {"binding": verdict.binding, "needed": verdict.needed, "limit": verdict.limit} == {
        name: content[name] for name in ("binding", "needed", "limit")
    }
    text = str(caught.value)
    assert "--" not in text
    fits = eval(text.rpartition("the nearest that fits: ")[2], {"meft": meft})
    assert isinstance(fits, meft.Plan)


def test_options_become_arguments_in_messages_only_where_they_are_options() -> None:
    assert argument_names("--seq-len 4: give --no-bf16-copy") == "seq_len 4: give bf16_copy=False"
    assert argument_names("file a--b.json, out/--x and - -") == "file a--b.json, out/--x and - -"
    changes = {"--top-k": "32", "--max-slowdown": "1.6", "--no-bf16-copy": "", "--activation-checkpointing": ""}
    given = {"model": Path("a/b"), "top_k": 64, "bf16_copy": True}
    assert call_with("meft.plan", given, changes) == (
        "meft.plan(model='a/b', top_k=32, bf16_copy=False, max_slowdown=1.6, activation_checkpointing=True)"
    )


# --- the arguments are the options ----------------------------------------------------------------------------------


def names_of(command: Any) -> set[str]:
    return {parameter.name for parameter in command.params}


NOT_ARGUMENTS = {"output", "as_json", "plot", "trace", "verbose", "request_file", "tokens", "help"}


def test_arguments_have_the_names_and_defaults_of_the_commands_options() -> None:
    planned, estimated = names_of(plan_command), names_of(estimate_command)
    assert PlanArguments.__annotations__.keys() == RequestOptions.__dataclass_fields__.keys()
    assert PlanArguments.__annotations__.keys() | {"verify"} == planned - NOT_ARGUMENTS
    assert EstimateArguments.__annotations__.keys() | {"method"} == EstimateRequest.model_fields.keys()
    assert EstimateRequest.model_fields.keys() | {"verify", "probe"} == estimated - NOT_ARGUMENTS
    shown = inspect.signature(meft.plan).parameters
    assert shown.keys() == PlanArguments.__annotations__.keys() | {"verify"}
    unsaid = plan_command.make_context("plan", []).params
    assert {name: each.default for name, each in shown.items()} == {name: unsaid[name] for name in shown}
    assert RequestOptions.taken_from(dict(unsaid)) == RequestOptions()


# --- what a notebook shows ------------------------------------------------------------------------------------------


def test_records_show_themselves_as_tables() -> None:
    plan = meft.plan(**SMALL)
    html = plan._repr_html_()
    assert f'<td style="text-align: right">{plan.decision.adapter_width:,}</td>' in html
    assert "Plan for smollm2-135m, 2 x 64 tokens on emulated" in html
    estimate = meft.estimate("lora", rank=8, model="qwen2.5-0.5b")
    assert "lora on qwen2.5-0.5b, rank 8" in estimate._repr_html_()
    assert f"{estimate.trainable_parameters:,}" in estimate._repr_html_()
    compared = meft.compare(**SMALL | {"model": str(shallow_model(Path("shallow")))})._repr_html_()
    assert [compared.count(f">{method}</td>") for method in ("meft", "parallel-adapter", "lora", "full")] == [1] * 4
    audited = meft.audit(sample_plan(), sample_report(sample_plan()))._repr_html_()
    assert "h2d_bytes_given_rows" in audited
    assert "2 steps: passed" in audited
    volume = meft.transfer_volume(top_k=[64])._repr_html_()
    assert ">1,592</td>" in volume


def test_what_is_shown_is_escaped() -> None:
    plan = sample_plan(gpu="<script>alert('&')</script>")
    assert "<script>" not in plan._repr_html_()
    assert "&lt;script&gt;alert(&#x27;&amp;&#x27;)" in plan._repr_html_()
