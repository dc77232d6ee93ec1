"""Inference with the adapter: the same answers alone and in company, the oracle's numbers, training undisturbed."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from sessions import EXPERTS, open_small, random_examples, small_plan, small_trainer
from transformers import LlamaForCausalLM

from meft.planner.base.errors import UsageError
from meft.runtime.adapter.oracle import DenseAdapter
from meft.runtime.data.examples import tokenize_record
from meft.runtime.data.records import Completion
from meft.runtime.host.router import TopKRouter
from meft.runtime.session.checkpoint import save_adapter
from meft.runtime.use.adapter_model import AdapterModel
from meft.runtime.use.evaluation import EvaluationOptions, EvaluationSchedule, make_evaluator, mean_loss, session_loss
from meft.runtime.use.generation import (
    GenerationOptions,
    ModelGenerator,
    SessionGenerator,
    answers,
    left_padded,
    prompt_ids,
)
from meft.runtime.use.inference import LayerRows, Serving, serving

PROMPTS = ["The queen said", "Alice", "the White Rabbit looked at the"]


def trained(folder, *, steps: int = 3, **choice: object):
    """A session whose adapter has learnt something, so that it changes what the model says."""
    session = open_small(folder, small_plan(folder, choice=choice))
    small_trainer(session, steps=steps).run()
    return session


@pytest.mark.parametrize("choice", [{}, EXPERTS, {"prefetch_depth": 1}])
def test_answers_do_not_depend_on_their_company(glass_folder, glass_tokenizer, choice) -> None:
    generator = SessionGenerator(trained(glass_folder, **choice))
    alone = answers(generator, glass_tokenizer, PROMPTS, GenerationOptions(6, batch_size=1))
    together = answers(generator, glass_tokenizer, PROMPTS, GenerationOptions(6, batch_size=len(PROMPTS)))
    assert together == alone
    assert len(set(alone)) > 1


def test_padding_on_the_left_leaves_the_logits(glass_folder) -> None:
    session = trained(glass_folder, **EXPERTS)
    ids, mask = left_padded([[5, 6, 7, 8, 9, 10, 11], [12, 13, 14]], pad_id=0)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with serving(session):
        padded = session.model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
        alone = session.model(input_ids=torch.tensor([[12, 13, 14]])).logits
    torch.testing.assert_close(padded[1:, 4:], alone, rtol=1e-4, atol=1e-4)


def test_the_head_gets_its_hidden_states_contiguous(glass_model) -> None:
    """Of prompts they are a slice, which a CPU multiplies by bf16 weights a thousand times as slowly."""
    seen: list[bool] = []
    head = glass_model.get_output_embeddings()
    head.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].is_contiguous()))
    ids = torch.ones(2, 4, dtype=torch.long)
    ModelGenerator(glass_model).generate(ids, ids, max_new_tokens=2, pad_id=0)
    assert seen == [True, True]
    assert len(head._forward_pre_hooks) == 0


def test_the_adapter_is_active(glass_folder, glass_tokenizer) -> None:
    session = trained(glass_folder)
    options = GenerationOptions(6, batch_size=2)
    with_adapter = answers(SessionGenerator(session), glass_tokenizer, PROMPTS, options)
    session.adapter.detach()
    assert answers(ModelGenerator(session.model), glass_tokenizer, PROMPTS, options) != with_adapter


def random_rows(num_experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Keys and values of 24 rows, eleven hidden states, and a router if there are experts; fp64, 8 wide."""
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(24, 8, dtype=torch.float64, generator=generator) for _ in range(2))
    hidden = torch.randn(11, 8, dtype=torch.float64, generator=generator)
    router = None if num_experts == 1 else torch.randn(num_experts, 8, dtype=torch.float64, generator=generator)
    return keys, values, hidden, router


@pytest.mark.parametrize("num_experts", [1, 4])
def test_rows_at_inference_are_the_oracles(num_experts) -> None:
    keys, values, hidden, router = random_rows(num_experts)
    probes = None if router is None else (hidden @ router.T).topk(2, dim=1).indices
    expected = DenseAdapter(keys, values, router)(hidden, probes=probes)
    torch.testing.assert_close(LayerRows(keys, values, router, 2).output(hidden), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("num_experts", [1, 4])
def test_a_token_meets_the_rows_that_it_alone_would_bring(num_experts) -> None:
    keys, values, hidden, router = random_rows(num_experts)
    oracle, choice = DenseAdapter(keys, values, router), TopKRouter(5, active_rows_cap=24, num_experts=num_experts)
    expected = []
    for token in hidden.split(1):
        probes = None if router is None else (token @ router.T).topk(2, dim=1).indices
        expected.append(oracle(token, rows=choice.select(0, keys, token, probes).rows, probes=probes))
    served = LayerRows(keys, values, router, 2, serving=Serving(5))
    torch.testing.assert_close(served.output(hidden), torch.cat(expected), rtol=1e-12, atol=1e-12)
    every = LayerRows(keys, values, router, 2)
    torch.testing.assert_close(replace(every, serving=Serving(24)).output(hidden), every.output(hidden), rtol=0, atol=0)
    assert not torch.allclose(served.output(hidden), every.output(hidden))


@pytest.mark.parametrize("choice", [{}, EXPERTS])
def test_in_training_and_loaded_a_token_meets_as_many_rows(glass_folder, tmp_path, choice) -> None:
    session = trained(glass_folder, **choice)
    save_adapter(session, tmp_path / "adapter", meft_version="test")
    ids = torch.arange(20).view(2, 10)
    with serving(session, Serving(3)):
        served = session.model(input_ids=ids).logits
    with serving(session):
        every = session.model(input_ids=ids).logits
    loaded = AdapterModel.from_pretrained(glass_folder, tmp_path / "adapter", rows_per_token=3)
    torch.testing.assert_close(loaded(input_ids=ids).logits, served, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(served, every, rtol=1e-3, atol=1e-3)


def test_a_model_made_from_a_plan_meets_as_many_rows_when_it_is_asked(glass_folder, tmp_path) -> None:
    session = trained(glass_folder)
    save_adapter(session, tmp_path / "adapter", meft_version="test")
    ids = torch.arange(20).view(2, 10)
    with serving(session, Serving(3)):
        expected = session.model(input_ids=ids).logits.clone()
    base = LlamaForCausalLM.from_pretrained(glass_folder)
    made = AdapterModel.from_plan(
        base, session.plan, device="emulated", adapter=tmp_path / "adapter", rows_per_token=3
    ).eval()
    torch.testing.assert_close(made(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)
    made.detach()


def test_no_row_at_all_is_refused() -> None:
    with pytest.raises(UsageError, match="rows_per_token 0: a token meets one row at least"):
        Serving(0)


def test_generation_is_counted_apart_and_leaves_no_rows_on_the_device(glass_folder, glass_tokenizer) -> None:
    session = trained(glass_folder)
    before = session.engine.bytes_in("h2d", "step"), session.engine.bytes_in("d2h", "step")
    answers(SessionGenerator(session), glass_tokenizer, PROMPTS[:1], GenerationOptions(3))
    assert (session.engine.bytes_in("h2d", "step"), session.engine.bytes_in("d2h", "step")) == before
    hidden_bytes = 4 * session.store.hidden_size * session.store.num_layers
    tokens = len(prompt_ids(glass_tokenizer, PROMPTS[0], raw=False)) + 2  # the last new token is never an input
    counted = session.engine.counted_bytes
    assert counted["d2h", "queries", "probe"] == counted["h2d", "outputs", "probe"] == tokens * hidden_bytes


@pytest.mark.parametrize("choice", [{}, EXPERTS])
def test_evaluating_in_between_changes_nothing_of_training(glass_folder, glass_tokenizer, tmp_path, choice) -> None:
    path = tmp_path / "task.jsonl"
    path.write_text("".join(f'{{"prompt": "{prompt}", "completion": " x"}}\n' for prompt in PROMPTS))
    options = EvaluationOptions(str(path), every=2, max_new_tokens=4)
    plan = small_plan(glass_folder, choice=choice)
    plain = small_trainer(open_small(glass_folder, plan), steps=5)
    plain.run()
    told: list[float] = []
    session = open_small(glass_folder, plan)
    evaluator = make_evaluator(options, glass_tokenizer, raw=True)
    schedule = EvaluationSchedule(evaluator, 2, lambda result: told.append(result.scores["exact_match"]))
    trainer = small_trainer(session, steps=5)
    trainer.evaluation = schedule
    trainer.run()
    assert [result.optimizer_steps for result in schedule.results] == [2, 4, 5]
    assert len(told) == 3
    assert trainer.history == plain.history
    for mine, theirs in zip(session.store.layers, plain.session.store.layers, strict=True):
        assert torch.equal(mine.weights, theirs.weights)
    assert trainer.measured.peaks == plain.measured.peaks


def test_the_loss_of_examples_is_the_models(glass_folder) -> None:
    """Before training the adapter is nothing: the base model's own loss, whatever the batches."""
    session = open_small(glass_folder, small_plan(glass_folder))
    examples = random_examples(5, length=20)
    losses = []
    for example in examples:
        ids = torch.tensor([example.input_ids])
        with serving(session):
            losses.append((float(session.model(input_ids=ids, labels=ids).loss), len(example.input_ids) - 1))
    expected = sum(loss * tokens for loss, tokens in losses) / sum(tokens for _, tokens in losses)
    found = mean_loss(partial(session_loss, session), examples, batch_size=2, seq_len=32, pad_id=0)
    assert found == pytest.approx(expected, rel=1e-5)


def test_a_prompt_is_what_training_put_before_a_completion(glass_tokenizer) -> None:
    prompt = "The queen said to the"
    (example,) = tokenize_record(Completion(prompt, " rabbit"), glass_tokenizer)
    ids = prompt_ids(glass_tokenizer, prompt, raw=False)
    assert list(example.input_ids[: len(ids)]) == ids


def test_an_empty_prompt_is_refused(glass_tokenizer) -> None:
    with pytest.raises(UsageError, match="--prompt: is empty"):
        prompt_ids(glass_tokenizer, "", raw=True)
