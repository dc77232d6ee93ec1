"""The adapter in people's own scripts: load and generate, train in a loop of one's own, and take it off again."""

from __future__ import annotations

import gc
import json
import shutil
import threading

import pytest
import torch
from sessions import EXPERTS, open_small, random_examples, small_plan, small_trainer
from transformers import LlamaForCausalLM

from meft.planner.base.errors import MeftError, UsageError
from meft.runtime.data.examples import Example, batch_indices, collate
from meft.runtime.device.lanes import WORKERS
from meft.runtime.session.checkpoint import AdapterConfig, adapter_tensors, base_digest, save_adapter
from meft.runtime.use.adapter_model import AdapterModel
from meft.runtime.use.inference import serving

IDS = torch.tensor([[5, 6, 7, 8, 9], [10, 11, 12, 13, 14]])
CHOICES = [
    {},
    EXPERTS,
    {"prefetch_depth": 1, "rows_in_backward": "refetched", "cached_rows": 64, "gradients_on_device": True, **EXPERTS},
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory, glass_folder):
    """A trained adapter's folder, and the logits that its session gave for IDS."""
    session = open_small(glass_folder, small_plan(glass_folder, choice=EXPERTS))
    small_trainer(session, steps=3).run()
    folder = tmp_path_factory.mktemp("saved") / "adapter"
    save_adapter(session, folder, meft_version="0.0.0")
    with serving(session):
        return folder, session.model(input_ids=IDS).logits


def test_a_loaded_adapter_gives_the_same_logits(saved, glass_folder, glass_model) -> None:
    folder, logits = saved
    for base in (glass_folder, glass_model):
        model = AdapterModel.from_pretrained(base, folder)
        with torch.no_grad():
            assert torch.equal(model(input_ids=IDS).logits, logits)
    assert not torch.equal(model.detach()(input_ids=IDS).logits, logits)


def test_detach_restores_the_base_exactly(saved, glass_model) -> None:
    folder, _ = saved
    state = {name: value.clone() for name, value in glass_model.state_dict().items()}
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in glass_model.modules()]
    with torch.no_grad():
        before = glass_model(input_ids=IDS).logits
        model = AdapterModel.from_pretrained(glass_model, folder)
        assert not torch.equal(model(input_ids=IDS).logits, before)
        assert model.detach() is glass_model
        assert torch.equal(glass_model(input_ids=IDS).logits, before)
    assert all(torch.equal(value, state[name]) for name, value in glass_model.state_dict().items())
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in glass_model.modules()] == hooks
    with pytest.raises(MeftError, match="detached already"):
        model.detach()


def test_detach_after_training_gives_back_modes_and_gradients(glass_folder, glass_model) -> None:
    glass_model.eval()
    required = [parameter.requires_grad for parameter in glass_model.parameters()]
    before = glass_model(input_ids=IDS).logits.detach()
    plan = small_plan(glass_folder, choice={"activation_checkpointing": True})
    model = AdapterModel.from_plan(glass_model, plan, device="emulated")
    optimizer = model.optimizer(learning_rate=1e-2)
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    assert glass_model.is_activation_checkpointing
    base = model.detach()
    assert not base.is_activation_checkpointing
    assert not any(module.training for module in base.modules())
    assert [parameter.requires_grad for parameter in base.parameters()] == required
    assert torch.equal(base(input_ids=IDS).logits, before)


def test_the_config_names_base_shapes_versions_and_plan(saved, glass_folder, glass_model) -> None:
    folder, _ = saved
    config = AdapterConfig.load(folder / "meft_config.json")
    assert config.base_model.name == "glass"
    assert config.plan_digest == small_plan(glass_folder, choice=EXPERTS).content_digest()
    assert set(config.versions) == {"python", "torch", "transformers"}
    assert config.base_digest == base_digest(glass_model)


def test_another_base_is_refused_by_field(saved, glass_folder, glass_model, tmp_path) -> None:
    folder, _ = saved
    config = json.loads((glass_folder / "config.json").read_text())
    other = type(glass_model)(type(glass_model.config).from_dict(config | {"num_hidden_layers": 2}))
    with pytest.raises(UsageError, match=r"belongs to glass, which this is not: num_layers 4 in the adapter, 2 here"):
        AdapterModel.from_pretrained(other, folder)
    with torch.no_grad():
        glass_model.model.norm.weight[0] += 1
    with pytest.raises(UsageError, match=r"base_digest .* \(same shape, other weights\)"):
        AdapterModel.from_pretrained(glass_model, folder)
    with pytest.raises(UsageError, match=r"no config\.json there"):
        AdapterModel.from_pretrained(tmp_path, folder)


def test_a_bf16_copy_of_the_base_is_the_same_base(glass_model) -> None:
    digest = base_digest(glass_model)
    assert base_digest(glass_model.to(torch.bfloat16)) == digest


def test_a_damaged_adapter_is_refused(saved, glass_folder, tmp_path) -> None:
    folder, _ = saved
    damaged = tmp_path / "adapter"
    shutil.copytree(folder, damaged)
    path = damaged / "meft_adapter.safetensors"
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(UsageError, match="not a complete safetensors file"):
        AdapterModel.from_pretrained(glass_folder, damaged)


def test_an_adapter_for_inference_cannot_train(saved, glass_folder) -> None:
    with pytest.raises(UsageError, match="is for inference"):
        AdapterModel.from_pretrained(glass_folder, saved[0]).optimizer(learning_rate=1.0)


# --- a loop of one's own ---------------------------------------------------------------------------------------------


def whole_examples(plan) -> list[Example]:
    """Eight sequences without padding: with a mask another attention kernel runs, whose last bits differ."""
    longer = random_examples(8, length=plan.request.seq_len + 4)
    return [example.truncated(plan.request.seq_len) for example in longer]


def own_loop(model, optimizer, plan, *, first: int, last: int) -> list[float]:
    """Steps as the trainer takes them, written as anyone would; learning rate constant."""
    examples = whole_examples(plan)
    losses = []
    for step in range(first, last):
        chosen = batch_indices(step, num_examples=8, batch_size=plan.request.batch_size, seed=0)
        batch = collate([examples[index] for index in chosen], seq_len=plan.request.seq_len, pad_id=0)
        loss = model(input_ids=batch.input_ids, labels=batch.labels).loss
        (loss / plan.request.grad_accum).backward()
        losses.append(loss.item())
        if (step + 1) % plan.request.grad_accum == 0:
            optimizer.step()
    return losses


@pytest.mark.parametrize("choice", CHOICES)
def test_an_own_loop_equals_meft_runs(glass_folder, glass_model, choice, monkeypatch) -> None:
    monkeypatch.setattr("meft.runtime.training.training.scheduled_learning_rate", lambda *_, peak, **__: peak)
    plan = small_plan(glass_folder, choice=choice, grad_accum=2)
    trainer = small_trainer(open_small(glass_folder, plan), steps=4)
    trainer.examples = whole_examples(plan)
    trainer.run()
    model = AdapterModel.from_plan(glass_model, plan, device="emulated")
    losses = own_loop(model, model.optimizer(learning_rate=1e-2), plan, first=0, last=4)
    assert losses == trainer.history.losses
    for name, tensor in adapter_tensors(trainer.session).items():
        assert torch.equal(model.state_dict()[name], tensor), name


@pytest.mark.parametrize("choice", CHOICES[:2])
def test_an_own_loop_resumes_bit_for_bit(glass_folder, choice) -> None:
    plan = small_plan(glass_folder, choice=choice)

    def fresh(seed: int = 0):
        base = LlamaForCausalLM.from_pretrained(glass_folder)
        model = AdapterModel.from_plan(base, plan, device="emulated", seed=seed)
        return model, model.optimizer(learning_rate=1e-2)

    straight, optimizer = fresh()
    losses = own_loop(straight, optimizer, plan, first=0, last=4)
    first, optimizer = fresh()
    assert optimizer.state_dict()["state"] == {}
    own_loop(first, optimizer, plan, first=0, last=2)
    resumed, other = fresh(seed=7)
    resumed.load_state_dict(first.state_dict())
    other.load_state_dict(optimizer.state_dict())
    assert own_loop(resumed, other, plan, first=2, last=4) == losses[2:]
    assert all(torch.equal(straight.state_dict()[name], value) for name, value in resumed.state_dict().items())


def test_evaluation_between_backward_and_step_loses_no_gradient(glass_folder, glass_model) -> None:
    plan = small_plan(glass_folder, choice={"prefetch_depth": 1, **EXPERTS})
    model = AdapterModel.from_plan(glass_model, plan, device="emulated")
    optimizer = model.optimizer(learning_rate=1e-2)
    model(input_ids=IDS, labels=IDS).loss.backward()
    model.eval()
    inferred = model(input_ids=IDS).logits
    assert model.generate(input_ids=IDS[:1], max_new_tokens=2, do_sample=False).shape[1] >= 6
    model.train()
    assert all(bool(tables.touched.any()) for tables in model.session.store.layers)
    optimizer.step()
    model.eval()
    assert not torch.equal(model(input_ids=IDS).logits, inferred)


@pytest.mark.parametrize("choice", CHOICES)
def test_zero_grad_forgets_what_no_step_has_used(glass_folder, glass_model, choice) -> None:
    model = AdapterModel.from_plan(glass_model, small_plan(glass_folder, choice=choice), device="emulated")
    optimizer = model.optimizer(learning_rate=1e-2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for forget in (model.zero_grad, optimizer.zero_grad):
        model(input_ids=IDS, labels=IDS).loss.backward()
        forget()
        optimizer.step()
        assert optimizer.last_gradient_norm == 0
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items() if "rows" in name)


@pytest.mark.parametrize("choice", CHOICES)
def test_what_zero_grad_forgot_is_in_no_later_gradient(glass_folder, choice) -> None:
    from transformers import LlamaForCausalLM

    norms = []
    for forgotten in (False, True):
        base = LlamaForCausalLM.from_pretrained(glass_folder)
        model = AdapterModel.from_plan(base, small_plan(glass_folder, choice=choice), device="emulated")
        optimizer = model.optimizer(learning_rate=1e-2)
        if forgotten:
            model(input_ids=IDS, labels=IDS).loss.backward()
            optimizer.zero_grad()
        model(input_ids=IDS + 20, labels=IDS + 20).loss.backward()
        optimizer.step()
        norms.append(optimizer.last_gradient_norm)
    assert norms[0] == norms[1]


def test_a_plan_for_another_model_is_refused(glass_folder, glass_model) -> None:
    plan = small_plan(glass_folder)
    shape = plan.request.model.model_copy(update={"num_layers": 5})
    wrong = plan.model_copy(update={"request": plan.request.model_copy(update={"model": shape})})
    with pytest.raises(UsageError, match="num_layers 5 in the plan, 4 here"):
        AdapterModel.from_plan(glass_model, wrong, device="emulated")


# --- lanes, and rows that stay on the device through a window --------------------------------------------------------

CACHED = {"cached_rows": 40, "gradients_on_device": True}


def cached_model(glass_folder, *, grad_accum: int = 2, **options: object):
    """A model of its own base whose rows stay on the device for a window, its optimizer, and the plan."""
    plan = small_plan(glass_folder, choice={"prefetch_depth": 1, **EXPERTS, **CACHED}, grad_accum=grad_accum)
    base = LlamaForCausalLM.from_pretrained(glass_folder)
    model = AdapterModel.from_plan(base, plan, device="emulated", **options)
    return model, model.optimizer(learning_rate=1e-2), plan


def assert_same_adapter(mine: AdapterModel, theirs: AdapterModel, *, left_out: tuple[str, ...] = ()) -> None:
    others = theirs.state_dict()
    for name, tensor in mine.state_dict().items():
        if not name.endswith(left_out):
            assert torch.equal(tensor, others[name]), name


def slow_updates(lane: str, name: str) -> float:
    return 1e-2 if name.startswith("adamw") else 0.0


def test_an_overlapped_own_loop_is_the_sequential_one(glass_folder) -> None:
    straight, optimizer, plan = cached_model(glass_folder, schedule="sequential")
    losses = own_loop(straight, optimizer, plan, first=0, last=6)
    model, optimizer, _ = cached_model(glass_folder, schedule="overlapped")
    model.session.engine.schedule._delay = slow_updates
    assert own_loop(model, optimizer, plan, first=0, last=2) == losses[:2]
    model.eval()
    model(input_ids=IDS)  # while rows are still updated
    model.train()
    assert own_loop(model, optimizer, plan, first=2, last=6) == losses[2:]
    assert_same_adapter(model, straight)
    model.detach()


@pytest.mark.parametrize("use", ["save", "infer"])
def test_what_uses_the_rows_waits_for_their_update(glass_folder, tmp_path, use) -> None:
    logits = []
    for schedule in ("sequential", "overlapped"):
        model, optimizer, plan = cached_model(glass_folder, schedule=schedule)
        if schedule == "overlapped":
            model.session.engine.schedule._delay = slow_updates
        own_loop(model, optimizer, plan, first=0, last=4)
        if use == "save":
            model.save_pretrained(tmp_path / schedule)
            base = LlamaForCausalLM.from_pretrained(glass_folder)
            model = AdapterModel.from_pretrained(base, tmp_path / schedule)
        model.eval()
        with torch.no_grad():
            logits.append(model(input_ids=IDS).logits)
    assert torch.equal(*logits)


@pytest.mark.parametrize("schedule", ["sequential", "overlapped"])
def test_zero_grad_forgets_sums_on_the_device(glass_folder, schedule) -> None:
    straight, optimizer, plan = cached_model(glass_folder, schedule=schedule)
    losses = own_loop(straight, optimizer, plan, first=0, last=2)
    model, optimizer, _ = cached_model(glass_folder, schedule=schedule)
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.zero_grad()
    assert own_loop(model, optimizer, plan, first=0, last=2) == losses
    uses = ("active_counts", "micro_batches", "_extra_state")  # a micro-batch that is forgotten was one all the same
    assert_same_adapter(model, straight, left_out=uses)


def test_a_forward_without_a_backward_leaves_no_gradient(glass_folder) -> None:
    """Its rows stay on the device, and later micro-batches add to their sums."""
    straight, optimizer, plan = cached_model(glass_folder)
    losses = own_loop(straight, optimizer, plan, first=0, last=2)
    model, optimizer, _ = cached_model(glass_folder)
    for sums in model.session.exchange._on_device.sums:
        sums.fill_(float("nan"))
    model(input_ids=IDS, labels=IDS)
    assert own_loop(model, optimizer, plan, first=0, last=2) == pytest.approx(losses, rel=1e-4)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, straight.state_dict()[name], rtol=1e-2, atol=2e-4)


def test_loaded_rows_replace_those_on_the_device(glass_folder) -> None:
    other, optimizer, plan = cached_model(glass_folder, seed=3)
    own_loop(other, optimizer, plan, first=0, last=4)
    model, _, _ = cached_model(glass_folder)
    model(input_ids=IDS, labels=IDS).loss.backward()  # rows and sums of an open window are on the device
    model.finish_backward()
    model.load_state_dict(other.state_dict())
    assert all(bool(tables.touched.any()) for tables in model.session.store.layers)  # the sums came to the host
    found = model(input_ids=IDS, labels=IDS).loss.item()
    assert found == pytest.approx(other(input_ids=IDS, labels=IDS).loss.item(), rel=1e-6)


def threads_of_ours() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("meft-")}


@pytest.mark.parametrize("end", ["detach", "forget"])
def test_the_lanes_end_with_the_model(glass_folder, end) -> None:
    gc.collect()
    before = threads_of_ours()
    model, optimizer, plan = cached_model(glass_folder, schedule="overlapped")
    own_loop(model, optimizer, plan, first=0, last=2)
    started = threads_of_ours() - before  # the kernels' too, if one had rows enough to share
    assert {f"meft-{lane}" for lane in WORKERS} <= {thread.name for thread in started}
    if end == "detach":
        model.detach()
    else:
        del model, optimizer
        gc.collect()
    for thread in started:
        thread.join(timeout=10)  # a pool that is forgotten tells its threads so, and does not wait for them
    assert not any(thread.is_alive() for thread in started)
