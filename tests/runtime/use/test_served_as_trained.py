"""What was trained is what is served: where few of many rows are active, and told from an adapter's folder."""

from __future__ import annotations

import json
from contextlib import nullcontext

import pytest
import torch
from sessions import EXPERTS, open_small, rows_by_step, small_plan, small_trainer
from transformers import LlamaForCausalLM

from meft.planner.base.errors import UsageError
from meft.runtime.data.examples import Example, collate
from meft.runtime.session.checkpoint import AdapterConfig, load_adapter, save_adapter
from meft.runtime.training.training import Trainer, TrainingOptions
from meft.runtime.use.adapter_model import AdapterModel
from meft.runtime.use.evaluation import EvaluationOptions, EvaluationSchedule, make_evaluator
from meft.runtime.use.generation import ModelGenerator, SessionGenerator
from meft.runtime.use.inference import LayerRows, Serving, serving

NUM_FACTS, BATCH, EPOCHS = 128, 16, 40


def facts() -> list[Example]:
    """Two tokens that name a fact, and three of 256 to learn: 24 random bits each."""
    generator = torch.Generator().manual_seed(0)
    keys = torch.randperm(256 * 256, generator=generator)[:NUM_FACTS].unsqueeze(1)
    values = torch.randint(256, 512, (NUM_FACTS, 3), generator=generator)
    lines = torch.cat([512 + keys // 256, 512 + keys % 256, values], dim=1).tolist()
    return [Example(tuple(line), (-100, -100, *line[2:])) for line in lines]


def learnt(folder, width: int, **choice: object):
    """A session that knows the facts, of which a micro-batch activates few of ``width`` rows."""
    sizes = {"adapter_width": width, "active_rows_cap": width, "rows_in_backward": "refetched"}
    session = open_small(folder, small_plan(folder, choice=sizes | choice, batch_size=BATCH, seq_len=5))
    session.device.scope = nullcontext  # no books: a third of the time
    options = TrainingOptions(steps=EPOCHS * NUM_FACTS // BATCH, learning_rate=1e-2)
    Trainer(session, facts(), options, pad_id=0, meft_version="0.0.0").run()
    return session


def as_trained(session) -> float:
    """Share of facts that training's own forward has right, batch by batch."""
    right = 0
    for first in range(0, NUM_FACTS, BATCH):
        batch = collate(facts()[first : first + BATCH], seq_len=5, pad_id=0)
        with torch.no_grad():
            best = session.model(input_ids=batch.input_ids).logits[:, 1:4].argmax(-1)
        right += int((best == batch.input_ids[:, 2:]).all(1).sum())
    return right / NUM_FACTS


def generated(generator) -> float:
    """Share of facts whose values the two tokens before them bring forth."""
    lines = torch.tensor([example.input_ids for example in facts()])
    said = generator.generate(lines[:, :2], torch.ones_like(lines[:, :2]), max_new_tokens=3, pad_id=0)
    return float((said == lines[:, 2:]).all(1).float().mean())


@pytest.mark.parametrize("width", [256, 1024, 4096])
def test_what_was_trained_is_what_is_served(glass_folder, tmp_path, width) -> None:
    session = learnt(glass_folder, width)
    expected = as_trained(session)
    assert expected > 0.95
    assert sum(session.store.use.active_rows()) / 4 < width / 2
    assert generated(SessionGenerator(session)) == pytest.approx(expected, abs=0.01)
    save_adapter(session, tmp_path / "adapter", meft_version="test")
    loaded = ModelGenerator(AdapterModel.from_pretrained(glass_folder, tmp_path / "adapter"))
    assert generated(loaded) == pytest.approx(expected, abs=0.01)
    if width > 256:  # as it was before: all rows
        assert generated(SessionGenerator(session, Serving(width))) < expected - 0.1


# --- a layer's rows ---------------------------------------------------------------------------------------------------


def random_layer(num_experts: int, **how: object) -> tuple[LayerRows, torch.Tensor]:
    """24 rows of random shares, of which a token brought 5, and eleven hidden states; fp64, 8 wide."""
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(24, 8, dtype=torch.float64, generator=generator) for _ in range(2))
    hidden = torch.randn(11, 8, dtype=torch.float64, generator=generator)
    router = None if num_experts == 1 else torch.randn(num_experts, 8, dtype=torch.float64, generator=generator)
    shares = torch.rand(24, dtype=torch.float64, generator=generator)
    return LayerRows(keys, values, router, 2, Serving(**how), top_k=5, shares=shares), hidden


def by_hand(rows: LayerRows, hidden: torch.Tensor, weight) -> torch.Tensor:
    """The output of each token, row by row; ``weight(row, score, own)`` is what the row counts."""
    outputs = []
    for token in hidden:
        gates = torch.ones(1, dtype=hidden.dtype) if rows.router is None else rows.router @ token
        probed = gates.topk(1 if rows.router is None else rows.num_probes).indices.tolist()
        per_expert = len(rows.keys) // len(gates)
        met = [row for row in range(len(rows.keys)) if row // per_expert in probed]
        scores = {row: float(rows.keys[row] @ token) for row in met}
        own = sorted(met, key=lambda row: -scores[row])[: rows.top_k]
        output = torch.zeros_like(token)
        for row in met:
            counted = weight(row, scores[row], row in own) * gates[row // per_expert]
            output += counted * max(scores[row], 0.0) * rows.values[row]
        outputs.append(output)
    return torch.stack(outputs)


@pytest.mark.parametrize("num_experts", [1, 4])
@pytest.mark.parametrize(
    ("how", "weight"),
    [
        ({}, lambda share, score, own: 1.0 if own else share),
        ({"rows_per_token": 5}, lambda share, score, own: float(own)),
        ({"min_score": 1.5}, lambda share, score, own: (1.0 if own else share) * (score >= 1.5)),
        ({"rows_per_token": 5, "min_score": 1.5}, lambda share, score, own: float(own and score >= 1.5)),
        ({"rows_per_token": 24}, lambda share, score, own: 1.0),
    ],
    ids=["as trained", "own", "scored", "own and scored", "all"],
)
def test_a_token_meets_its_own_rows_and_of_others_their_share(num_experts, how, weight) -> None:
    rows, hidden = random_layer(num_experts, **how)
    assert rows.shares is not None
    expected = by_hand(rows, hidden, lambda row, score, own: weight(float(rows.shares[row]), score, own))
    torch.testing.assert_close(rows.output(hidden), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("score", [-1.0, float("nan"), float("inf")])
def test_a_least_score_is_a_number_from_0_on(score) -> None:
    with pytest.raises(UsageError, match=r"min_score .*give 0 or more"):
        Serving(min_score=score)


# --- what a run leaves of it ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("choice", [{}, EXPERTS, {"cached_rows": 32}, {"hot_rows": 16, "hot_after_steps": 2}])
def test_a_run_counts_how_often_each_row_was_active(glass_folder, tmp_path, choice) -> None:
    session = open_small(glass_folder, small_plan(glass_folder, choice=choice))
    trainer = small_trainer(session, steps=5, output=tmp_path)
    rows = rows_by_step(trainer)
    trainer.run()
    measured = [sum(of_layer) / 5 for of_layer in zip(*rows["active_rows"], strict=True)]
    assert session.store.use.active_rows() == pytest.approx(measured)
    assert all(0 < count.max() <= 5 for count in session.store.use.counts)
    save_adapter(session, tmp_path / "adapter", meft_version="test")
    config = AdapterConfig.load(tmp_path / "adapter" / "meft_config.json")
    assert config.active_rows_per_layer == pytest.approx(measured)
    resumed = open_small(glass_folder, session.plan)
    again = small_trainer(resumed, steps=8, output=tmp_path)
    again.resume(tmp_path / "checkpoint-00000005")
    assert resumed.store.use.active_rows() == session.store.use.active_rows()
    again.run()
    assert int(resumed.store.use.micro_batches) == 8


def test_an_adapter_of_an_older_version_is_served_with_all_rows(glass_folder, tmp_path) -> None:
    from safetensors.torch import load_file, save_file

    session = open_small(glass_folder, small_plan(glass_folder))
    small_trainer(session, steps=3).run()
    save_adapter(session, tmp_path, meft_version="test")
    path, ids = tmp_path / "meft_adapter.safetensors", torch.arange(20).view(2, 10)
    kept = {name: tensor for name, tensor in load_file(path).items() if name.endswith("rows")}
    save_file(kept, path)
    config = json.loads((tmp_path / "meft_config.json").read_text())
    assert config.pop("active_rows_per_layer")
    del config["digest"]
    older = AdapterConfig.model_validate(config)
    assert older.active_rows_per_layer == ()
    older.save(tmp_path / "meft_config.json")
    with serving(session, Serving(128)):
        expected = session.model(input_ids=ids).logits.clone()
    loaded = AdapterModel.from_pretrained(glass_folder, tmp_path)
    torch.testing.assert_close(loaded(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)
    load_adapter(session, tmp_path)
    assert session.store.use.active_rows() == ()
    with serving(session):
        torch.testing.assert_close(session.model(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_many_more_rows_than_in_training_are_warned_of(glass_folder, glass_tokenizer, tmp_path) -> None:
    session = open_small(glass_folder, small_plan(glass_folder))
    small_trainer(session, steps=3).run()
    save_adapter(session, tmp_path, meft_version="test")
    few = int(min(session.store.use.active_rows()))
    said = r"rows per token 128: in training a token met \d+ rows of a layer at most"
    with pytest.warns(UserWarning, match=said):
        AdapterModel.from_pretrained(LlamaForCausalLM.from_pretrained(glass_folder), tmp_path, rows_per_token=128)
    AdapterModel.from_pretrained(LlamaForCausalLM.from_pretrained(glass_folder), tmp_path, rows_per_token=few)
    task = tmp_path / "task.jsonl"
    task.write_text('{"prompt": "Alice", "completion": " x"}\n')
    told: list[str] = []
    evaluator = make_evaluator(EvaluationOptions(str(task), rows_per_token=128), glass_tokenizer, raw=True)
    schedule = EvaluationSchedule(evaluator, warn=told.append)
    schedule.evaluate(session, 1)
    schedule.evaluate(session, 2)
    assert len(told) == 1
    assert "rows per token 128" in told[0]


def test_a_least_score_reaches_a_model_that_trains(glass_folder) -> None:
    """None of the rows is scored so high: what is left is the base."""
    base, ids = LlamaForCausalLM.from_pretrained(glass_folder), torch.arange(20).view(2, 10)
    expected = base(input_ids=ids).logits.detach().clone()
    session = open_small(glass_folder, small_plan(glass_folder))
    small_trainer(session, steps=3).run()
    with serving(session, Serving(min_score=1e6)):
        torch.testing.assert_close(session.model(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)
