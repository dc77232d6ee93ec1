"""The benchmark of capacity in its reduced form, and what its committed results show."""

from __future__ import annotations

import json
import sys

import pytest
from click.testing import CliRunner
from places import ROOT

pytest.importorskip("peft")
sys.path.insert(0, str(ROOT / "benchmarks"))
import capacity

RESULTS = ROOT / "benchmarks" / "capacity_results.jsonl"
BUDGET = 144 * 1024


def invoke(*arguments: object) -> str:
    done = CliRunner().invoke(capacity.main, [str(each) for each in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.fixture(scope="module")
def results(tmp_path_factory, glass_folder):
    """The quick form, cut off after its first run and then gone on with."""
    path = tmp_path_factory.mktemp("capacity") / "results.jsonl"
    quick = ("run", "--quick", "--results", path, "--model", glass_folder)
    assert "4 runs, 1 to do now" in invoke(*quick, "--max-runs", 1)
    assert "4 runs, 3 to do now" in invoke(*quick)
    return path


def test_every_method_has_the_same_device_bytes(results) -> None:
    records = {record["method"]: record for record in capacity.read_results(results)}
    assert set(records) == set(capacity.NAMES)
    for record in records.values():
        assert 0.99 * BUDGET < record["device_bytes"] <= BUDGET
        assert record["device_bytes"] <= record["method_bytes"] < 1.35 * BUDGET  # blocks, and step counts of AdamW
        assert record["bits_offered"] == 32 * 24
        assert record["bits_stored"] <= record["bits_stored_clamped"] <= record["bits_offered"]
        assert record["bits_stored_open"] <= record["bits_stored"]
    meft, whole = records["meft"], records["lora-streamed"]
    assert meft["as_trained"]["bits_stored"] == pytest.approx(meft["bits_stored"], abs=0.02 * meft["bits_offered"])
    assert whole["h2d_bytes_per_step"] > records["lora"]["h2d_bytes_per_step"]
    assert meft["bits_stored"] > records["lora"]["bits_stored"]


def test_a_report_of_what_is_there(results, tmp_path) -> None:
    shown = invoke("report", "--results", results, "--figure", tmp_path / "figure.png").splitlines()
    assert len(shown) == 2 + 4
    assert all(line.count("|") == shown[0].count("|") for line in shown)
    assert (tmp_path / "figure.png").stat().st_size > 5000


def test_bits_are_what_the_loss_leaves_of_them() -> None:
    """Facts are the same whatever their number, and differ."""
    facts = capacity.facts_of(64)
    assert capacity.facts_of(64) == facts
    assert len({fact.input_ids[:2] for fact in facts}) == 64
    assert capacity.BITS_PER_FACT == 24


def record(rate: float, seed: int, bits: float) -> dict:
    kept = dict.fromkeys(("bits_stored", "bits_stored_clamped", "bits_stored_open", "exact_match"), bits)
    run = capacity.asdict(capacity.Run("lora", 1, rate, seed, 512))
    return run | kept | {"device_bytes": 1, "bits_offered": 10, "trainable_parameters": 1}


def test_the_best_rate_is_that_with_all_seeds() -> None:
    records = [record(1e-2, 0, 3.0), record(1e-2, 1, 1.0), record(2e-2, 0, 9.0)]
    (row,) = capacity.summarise(records)
    assert (row["learning_rate"], row["bits_stored"], row["range"], row["seeds"]) == (1e-2, 2.0, (1.0, 3.0), [0, 1])


def test_other_seeds_go_to_the_best_rate_once_the_grid_is_done() -> None:
    first = [capacity.Run("lora", 1, rate, 0, 512) for rate in (1e-2, 2e-2)]
    records = [{"key": run.key, "bits_stored_clamped": run.learning_rate} for run in first]
    assert capacity.second_stage(first, records[:1], (1,)) == []
    assert capacity.second_stage(first, records, (1,)) == [capacity.replace(first[1], seed=1)]


def test_the_committed_results_show_what_is_said_of_them() -> None:
    """In equal device bytes MEFT holds at least three times LoRA's bits of 1,024 facts, trained as long.

    Streamed LoRA is beside it.
    """
    records = [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]
    alike = [row for row in capacity.summarise(records) if (row["facts"], row["epochs"]) == (1024, 50)]
    rows = {(row["method"], row["size"]): row for row in alike}
    meft, lora, whole = rows["meft", 72], rows["lora", 1], rows["lora-streamed", 8]
    assert {row["device_bytes"] // 1024 for row in (meft, lora, whole)} <= {143, 144}
    assert meft["bits_stored_clamped"] >= 3 * lora["bits_stored_clamped"]
    assert len(meft["seeds"]) == 2
