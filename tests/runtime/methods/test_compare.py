"""``meft-run compare``: every method that fits, at the best of its grid; stopped and started again it goes on."""

from __future__ import annotations

import gc
import json
import weakref
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meft.planner.base.errors import UsageError
from meft.runtime.cli.compare import _candidate, _workload, compare_command
from meft.runtime.methods import compare as comparing
from meft.runtime.methods.compare import Candidate, Row, Run, markdown, read_results, rows_of, shown
from meft.runtime.methods.compare_figure import draw, spread_out

GIVEN = {
    "batch_size": 2,
    "seq_len": 16,
    "meft_width": 64,
    "weights_dtype": "fp32",
    "attention": "sdpa",
    "learning_rates": None,
}
"""What the command was given."""


@pytest.fixture(scope="module")
def compared(tmp_path_factory, glass_folder):
    """Two seeds of some methods under a budget that full fine-tuning does not fit."""
    folder = tmp_path_factory.mktemp("compare")
    data = folder / "facts.jsonl"
    words = ("alice", "rabbit", "hatter")
    data.write_text("".join(json.dumps({"prompt": f"The {one} said", "completion": " yes"}) + "\n" for one in words))
    return folder, data, glass_folder


def run_compare(compared, *options: object) -> None:
    folder, data, model = compared
    given = ["--model", model, "--data", data, "--eval", data, "--prose", data, "--gpu-mem", "12MiB", "--seeds", 2,
             "--epochs", 3, "--batch-size", 2, "--seq-len", 16, "--meft-width", 64, "--max-new-tokens", 2,
             "--methods", "none,meft,meft:routing=centroid:top_k=16,peft:ia3,full,bitfit,meft:depth=2",
             "--learning-rates", "1e-3,1e-2", "--output-dir", folder / "out", *options]  # fmt: skip
    compare_command.main([str(each) for each in given], standalone_mode=False)


def test_a_comparison_is_one_table_one_figure_and_goes_on(compared, capsys) -> None:
    run_compare(compared)
    folder, printed = compared[0] / "out", capsys.readouterr()
    assert {path.name for path in folder.iterdir()} == {"results.jsonl", "table.md", "figure.png"}
    records = read_results(folder / "results.jsonl")
    runs = sorted((each["method"], each["learning_rate"], each["seed"]) for each in records.values())
    ran = ("meft", "meft:routing=centroid:top_k=16", "peft:ia3")
    grid = [(name, rate, 0) for name in ran for rate in (1e-3, 1e-2)]
    assert [run for run in runs if run[2] == 0] == sorted([*grid, ("none", 0.0, 0)])
    assert sorted(run[0] for run in runs if run[2] == 1) == sorted((*ran, "none"))
    for record in records.values():
        if record["method"] != "none":
            assert record["peak_allocated_bytes"] == pytest.approx(record["predicted"], rel=0.03)
    table = (folder / "table.md").read_text()
    assert printed.out.startswith(table)
    lines = dict(line.split("|")[1:4:2] for line in table.splitlines()[2:])
    assert "does not fit" in lines[" full "]
    assert "no biases" in lines[" bitfit "]
    assert "unknown argument 'depth'" in lines[" meft:depth=2 "]
    sizes = {each["method"]: each["size"] for each in records.values()}
    assert sizes["meft:routing=centroid:top_k=16"] == "width 64, K 16"
    assert "run 1 of 7 and 4 more: none" in printed.err
    assert " left" in printed.err

    kept = (folder / "results.jsonl").read_text().splitlines()
    (folder / "results.jsonl").write_text("\n".join(kept[:-1]) + "\n" + kept[-1][:20])  # cut off by a kill
    run_compare(compared)
    assert "run 1 of 1" in capsys.readouterr().err
    assert len(read_results(folder / "results.jsonl")) == len(kept)


def test_a_run_is_known_by_what_is_trained_whatever_was_predicted_of_it(compared) -> None:
    one = _candidate("meft", compared[2], 12 << 20, GIVEN)
    slower = one.plan.prediction.timing.model_copy(update={"step_seconds": 1.0})
    predicted_anew = one.plan.prediction.model_copy(update={"timing": slower})
    elsewhere = one.plan.request.model_copy(update={"host_mem_bytes": 1 << 40})
    same = replace(one, plan=one.plan.model_copy(update={"prediction": predicted_anew, "request": elsewhere}))
    other = _candidate("meft:top_k=8", compared[2], 12 << 20, GIVEN)
    keys = [Run(each, 1e-3, 0).key("work") for each in (one, same, replace(other, name="meft"))]
    assert keys[0] == keys[1] != keys[2]


def test_the_same_facts_in_another_folder_are_the_same_work(compared, tmp_path) -> None:
    _, data, model = compared
    copied, other = tmp_path / "copied.jsonl", tmp_path / "other.jsonl"
    copied.write_bytes(data.read_bytes())
    other.write_text(data.read_text().replace("yes", "no"))
    options = {"raw": True, "seq_len": 16, "batch_size": 2, "max_new_tokens": 2, "epochs": 1.0}
    asked = {"metric": None, "eval_limit": None, "prose": None}
    digests = [_workload(model, (data,), str(task), 1, options | asked).digest for task in (data, copied, other)]
    assert digests[0] == digests[1] != digests[2]


def test_a_run_that_is_over_holds_no_memory(compared, tmp_path, monkeypatch) -> None:
    """Models and sessions refer to themselves in circles, which the collector would find dozens of runs later."""
    opened: list[weakref.ref] = []
    original = comparing._opened

    def noted(run, work):
        session = original(run, work)
        opened.append(weakref.ref(session))
        return session

    monkeypatch.setattr(comparing, "_opened", noted)
    _, data, model = compared
    options = {"raw": True, "seq_len": 16, "batch_size": 2, "max_new_tokens": 2, "epochs": 1.0}
    work = _workload(model, (data,), str(data), 12 << 20, options | {"metric": None, "eval_limit": 1, "prose": None})
    runs = [Run(_candidate(name, model, 12 << 20, GIVEN | {"rank": 4}), 1e-3, 0) for name in ("lora", "meft")]
    gc.disable()
    try:
        comparing.perform(runs, work, tmp_path / "results.jsonl", say=print)
        left = [reference() for reference in opened]
    finally:
        gc.enable()
    assert left == [None, None]
    assert all("score" in record for record in read_results(tmp_path / "results.jsonl").values())


def test_what_was_not_run_has_its_reason(compared, tmp_path) -> None:
    work = type("Work", (), {"digest": "x"})()
    waiting, failed = Candidate("lora", "rank 4", (1e-3,)), Candidate("full", "-", refused="does not fit")
    rows = rows_of([waiting, failed], work, range(1), tmp_path / "none.jsonl")
    assert [row.reason for row in rows] == ["not run yet", "does not fit"]
    assert "| full | - | does not fit |" in markdown(rows)


def test_a_figure_has_a_marker_for_each_method_that_ran(tmp_path) -> None:
    rows = [Row("lora", "-", score=0.5, spread=0.1, seeds=2, prose_loss=3.0, peak_bytes=1 << 20),
            Row("full", "-", reason="does not fit"), Row("none", "-", prose_loss=2.9)]  # fmt: skip
    draw(rows, tmp_path / "figure.png", metric="em")
    assert (tmp_path / "figure.png").stat().st_size > 1000


def test_a_variant_of_meft_is_a_plan_with_its_options_and_has_one_rate(compared) -> None:
    own = _candidate("meft:tokens-see=own", compared[2], 12 << 20, GIVEN)
    assert own.plan.request.tokens_see == "own"
    assert own.rates == (8e-3,)
    other = {"weights_dtype": "bf16", "attention": "eager"}
    changed = _candidate("meft", compared[2], 12 << 20, GIVEN | other).plan.request
    assert (changed.weights_dtype, changed.attention) == ("bf16", "eager")
    lora = _candidate("lora", compared[2], 12 << 20, GIVEN | other | {"rank": 4})
    assert (lora.setup.weights_dtype, lora.setup.attention) == ("bf16", "eager")
    with pytest.raises(UsageError, match="OPTION=VALUE"):
        _candidate("meft:own", compared[2], 12 << 20, GIVEN)


def test_a_base_is_shown_by_the_name_of_its_folder() -> None:
    assert shown("meft:model=some/where/pruned:top_k=8") == "meft:model=pruned:top_k=8"
    assert shown("meft:routing=centroid") == "meft:routing=centroid"


@given(st.lists(st.floats(-0.5, 1.5), max_size=30))
def test_names_are_spread_in_order_and_apart(wanted) -> None:
    places = spread_out(sorted(wanted), gap=0.05)
    gap = min(0.05, 1.0 / max(len(wanted) - 1, 1))
    assert all(after - before > gap - 1e-9 for before, after in pairwise(places))
    assert all(-1e-9 <= place <= 1 + 1e-9 for place in places)
    if len(wanted) == 1 and 0 <= wanted[0] <= 1:
        assert places == wanted


def test_wrong_rates_are_one_line(compared) -> None:
    with pytest.raises(UsageError, match="give numbers with commas"):
        run_compare(compared, "--learning-rates", "fast")
