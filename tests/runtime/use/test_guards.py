"""What would train nothing, or something else than planned: one line each. And loops that do work."""

from __future__ import annotations

import gc

import pytest
import torch
from sessions import EXPERTS, small_plan
from transformers import LlamaForCausalLM

from meft.planner.base.errors import UsageError
from meft.runtime.use.adapter_model import AdapterModel
from meft.runtime.use.guards import REFUSED_METHODS

IDS = torch.tensor([[5, 6, 7, 8, 9], [10, 11, 12, 13, 14]])
CHOICES = [{}, {"prefetch_depth": 1, **EXPERTS}]


def opened(glass_folder, *, choice=CHOICES[1], dtype=torch.float32, **request):
    base = LlamaForCausalLM.from_pretrained(glass_folder, dtype=dtype)
    return AdapterModel.from_plan(base, small_plan(glass_folder, choice=choice, **request), device="emulated")


# --- optimizers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("choice", CHOICES)
def test_another_optimizer_over_the_models_parameters_is_refused_at_its_step(glass_folder, choice) -> None:
    model = opened(glass_folder, choice=choice)
    foreign = torch.optim.SGD(model.parameters(), lr=1e-2)
    model(input_ids=IDS, labels=IDS).loss.backward()
    with pytest.raises(UsageError, match=r"SGD would train nothing of this adapter.*model\.optimizer\("):
        foreign.step()
    model.detach()
    foreign.step()  # of a base that nobody trains an adapter beside


def test_an_optimizer_over_other_parameters_may_step_beside(glass_folder) -> None:
    model = opened(glass_folder)
    head = torch.nn.Linear(4, 1)
    beside = torch.optim.SGD(head.parameters(), lr=1.0)
    before = head.bias.detach().clone()
    head(torch.ones(4)).backward()
    beside.step()
    assert not torch.equal(head.bias, before)
    model.detach()


@pytest.mark.parametrize("choice", [*CHOICES, {"cached_rows": 40, "gradients_on_device": True, **EXPERTS}])
def test_asking_for_the_norm_of_gradients_changes_nothing(glass_folder, choice) -> None:
    states, norms = [], []
    for asked in (False, True):
        model = opened(glass_folder, choice=choice)
        optimizer = model.optimizer(learning_rate=1e-2)
        for _ in range(3):
            for _ in range(2):
                loss = model(input_ids=IDS, labels=IDS).loss
                assert model.row_norm.grad is None  # between a forward and its backward there is none
                loss.backward()
                if asked:
                    norm = torch.nn.utils.get_total_norm(p.grad for p in model.parameters() if p.grad is not None)
            optimizer.step()
            if asked:
                norms.append((float(norm), optimizer.last_gradient_norm))
        assert model.row_norm.grad is None
        states.append(model.state_dict())
    for name, tensor in states[0].items():
        torch.testing.assert_close(states[1][name], tensor, rtol=1e-5, atol=1e-6)
    assert [mine for mine, _ in norms] == pytest.approx([real for _, real in norms], rel=1e-5)


# --- what the plan says ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 32), (2, 33), (1, 40)])
def test_a_batch_that_is_larger_than_planned_is_refused(glass_folder, shape) -> None:
    model = opened(glass_folder)
    request = model.session.plan.request
    assert (request.batch_size, request.seq_len) == (2, 32)
    ids = torch.full(shape, 5)
    with pytest.raises(
        UsageError, match=rf"a batch of {shape[0]} x {shape[1]} tokens: the plan's memory is for 2 x 32"
    ):
        model(input_ids=ids, labels=ids)
    model.eval()
    assert model(input_ids=ids).logits.shape[:2] == shape  # inference is not the plan's


def test_more_sequences_of_fewer_tokens_fit(glass_folder) -> None:
    model = opened(glass_folder)
    ids = torch.full((4, 16), 5)
    model(input_ids=ids, labels=ids).loss.backward()


def test_a_base_in_another_dtype_than_planned_is_refused(glass_folder, glass_model) -> None:
    plan = small_plan(glass_folder, weights_dtype="bf16")
    with pytest.raises(UsageError, match=r"a base in bf16, and this one has weights in fp32: load it with dtype=torch"):
        AdapterModel.from_plan(glass_model, plan, device="emulated")
    with pytest.raises(UsageError, match=r"for a base in nf4, and this one is not quantized"):
        AdapterModel.from_plan(glass_model, small_plan(glass_folder, weights_dtype="nf4"), device="emulated")
    AdapterModel.from_plan(glass_model.to(torch.bfloat16), plan, device="emulated").detach()


def test_a_training_model_is_not_cast_or_moved(glass_folder) -> None:
    model = opened(glass_folder)
    for move in (model.half, lambda: model.to(torch.bfloat16), lambda: model.to("meta")):
        with pytest.raises(UsageError, match=r"stays where its plan put it \(cpu, torch\.float32\)"):
            move()
    assert model.to("cpu", torch.float32) is model


def test_tokens_beyond_the_vocabulary_are_named(glass_folder) -> None:
    model = opened(glass_folder)
    for token in (1024, -1):
        ids = torch.tensor([[5, 6, token]])
        with pytest.raises(
            UsageError, match=rf"input_ids, sequence 1: token {token}, but .* 1,024 tokens \(0 to 1,023\)"
        ):
            model(input_ids=ids, labels=ids)


# --- one adapter on one base -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(glass_folder, tmp_path_factory):
    folders = []
    for seed in (1, 2):
        base = LlamaForCausalLM.from_pretrained(glass_folder)
        plan = small_plan(glass_folder, choice=EXPERTS)
        model = AdapterModel.from_plan(base, plan, device="emulated", seed=seed)
        optimizer = model.optimizer(learning_rate=1e-2)
        for _ in range(2):
            model(input_ids=IDS, labels=IDS).loss.backward()
            optimizer.step()
        folders.append(tmp_path_factory.mktemp("saved") / f"adapter-{seed}")
        model.save_pretrained(folders[-1])
    return folders


def test_a_second_adapter_by_accident_is_refused(glass_folder, glass_model, saved) -> None:
    plan = small_plan(glass_folder)
    model = AdapterModel.from_plan(glass_model, plan, device="emulated")
    with pytest.raises(UsageError, match=r"carries an adapter already \(one without a name\).*model\.detach\(\)"):
        AdapterModel.from_plan(glass_model, plan, device="emulated")
    with pytest.raises(UsageError, match=r"carries an adapter already"):
        AdapterModel.from_pretrained(glass_model, saved[0], adapter_name="one")
    model.detach()
    again = AdapterModel.from_plan(glass_model, plan, device="emulated")
    hooks = sum(len(module._forward_hooks) for module in glass_model.modules())
    assert hooks == 4  # one beside each FFN
    again.detach()
    assert not hasattr(glass_model, "_meft_adapters")


def test_an_adapter_that_nobody_holds_leaves_the_base(glass_folder, glass_model) -> None:
    required = [parameter.requires_grad for parameter in glass_model.parameters()]
    AdapterModel.from_plan(glass_model, small_plan(glass_folder), device="emulated")
    gc.collect()
    assert sum(len(module._forward_hooks) for module in glass_model.modules()) == 0
    assert [parameter.requires_grad for parameter in glass_model.parameters()] == required
    AdapterModel.from_plan(glass_model, small_plan(glass_folder), device="emulated").detach()


def test_several_adapters_by_name_answer_for_themselves(glass_model, saved) -> None:
    with torch.no_grad():
        bare = glass_model(input_ids=IDS).logits
        alone = []
        for folder in saved:
            model = AdapterModel.from_pretrained(glass_model, folder)
            alone.append(model(input_ids=IDS).logits)
            model.detach()
        assert not torch.equal(*alone)
        one, two = (AdapterModel.from_pretrained(glass_model, folder, adapter_name=folder.name) for folder in saved)
        assert torch.equal(one(input_ids=IDS).logits, alone[0])
        assert torch.equal(two(input_ids=IDS).logits, alone[1])
        assert torch.equal(glass_model(input_ids=IDS).logits, bare)
        with pytest.raises(UsageError, match="adapter_name='adapter-1': the base carries an adapter of this name"):
            AdapterModel.from_pretrained(glass_model, saved[1], adapter_name="adapter-1")
        one.detach()
        assert torch.equal(two(input_ids=IDS).logits, alone[1])
        two.detach()
        assert not hasattr(glass_model, "_meft_adapters")


def test_adapters_are_switched_generate_with_the_cache_and_are_saved(glass_model, saved, tmp_path) -> None:
    """By turns on one base, each as alone, whatever the other did before; what is saved is what was loaded."""
    prompt, how = IDS[:1, :5], {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}

    def answers(model, *, use_cache: bool = True) -> list[int]:
        return model.generate(input_ids=prompt, use_cache=use_cache, **how)[0].tolist()

    alone = []
    for folder in saved:
        model = AdapterModel.from_pretrained(glass_model, folder)
        alone.append(answers(model, use_cache=False))
        model.detach()
    one, two = (AdapterModel.from_pretrained(glass_model, folder, adapter_name=folder.name) for folder in saved)
    assert [answers(model) for model in (one, two, one, two)] == alone * 2
    with torch.no_grad():
        before = two(input_ids=IDS).logits
    for model, source in zip((one, two), saved, strict=True):
        model.save_pretrained(tmp_path / source.name)
        for path in source.iterdir():
            assert (tmp_path / source.name / path.name).read_bytes() == path.read_bytes()
    one.detach()
    with torch.no_grad():
        assert torch.equal(two(input_ids=IDS).logits, before)
    two.detach()
    again = AdapterModel.from_pretrained(glass_model, tmp_path / saved[1].name)
    assert answers(again) == alone[1]
    again.detach()


@pytest.mark.parametrize("name", sorted(REFUSED_METHODS))
def test_methods_of_the_base_that_would_do_half_are_refused(glass_model, saved, name) -> None:
    model = AdapterModel.from_pretrained(glass_model, saved[0])
    if hasattr(glass_model, name):
        with pytest.raises(UsageError, match=f"^{name}: not on a model with an adapter of MEFT beside it; "):
            getattr(model, name)
    else:
        assert not hasattr(model, name)
    assert model.config is glass_model.config  # the others are the base's


def test_checkpointing_is_the_plans(glass_folder) -> None:
    with pytest.raises(UsageError, match="the plan decided against it"):
        opened(glass_folder).gradient_checkpointing_enable()
    model = opened(glass_folder, choice={"activation_checkpointing": True})
    model.gradient_checkpointing_enable()
    assert model.base.is_activation_checkpointing


# --- loops of one's own ------------------------------------------------------------------------------------------


def losses_of(model, *, autocast: bool = False, backward_inside: bool = False, own_loss: bool = False) -> list[float]:
    optimizer = model.optimizer(learning_rate=1e-2)
    losses = []
    for _ in range(4):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            outputs = model(input_ids=IDS, labels=IDS)
            loss = outputs.loss
            if own_loss:
                shifted = outputs.logits[:, :-1].float().flatten(0, 1)
                loss = torch.nn.functional.cross_entropy(shifted, IDS[:, 1:].flatten())
            if backward_inside:
                loss.backward()
        if not backward_inside:
            loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("backward_inside", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("choice", CHOICES)
def test_autocast_by_hand_is_near_the_plain_loop(glass_folder, choice, checkpointing, backward_inside) -> None:
    choice = choice | {"activation_checkpointing": checkpointing}
    plain = losses_of(opened(glass_folder, choice=choice))
    cast = losses_of(opened(glass_folder, choice=choice), autocast=True, backward_inside=backward_inside)
    assert cast == pytest.approx(plain, rel=2e-2)
    assert cast[-1] < 0.9 * cast[0]


def test_the_adapters_own_numbers_are_the_plans_under_autocast(glass_folder, monkeypatch) -> None:
    model = opened(glass_folder)
    seen = []
    exchange = model.session.exchange
    rows = exchange.rows
    monkeypatch.setattr(exchange, "rows", lambda layer: seen.append(torch.is_autocast_enabled("cpu")) or rows(layer))
    losses_of(model, autocast=True, backward_inside=True)
    assert seen
    assert not any(seen)


def test_a_loss_of_ones_own_from_the_logits_is_the_models(glass_folder) -> None:
    plain = losses_of(opened(glass_folder))
    assert losses_of(opened(glass_folder), own_loss=True) == pytest.approx(plain, rel=1e-4)


def test_two_forwards_before_one_backward_are_refused(glass_folder) -> None:
    model = opened(glass_folder)
    optimizer = model.optimizer(learning_rate=1e-2)
    first, second = (model(input_ids=IDS + shift, labels=IDS + shift).loss for shift in (0, 20))
    with pytest.raises(UsageError, match=r"Call backward\(\) after each forward"):
        (first + second).backward()
    optimizer.zero_grad()
    optimizer.step()
    assert optimizer.last_gradient_norm == 0  # nothing half done is left
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    assert optimizer.last_gradient_norm > 0


def test_a_second_backward_of_one_forward_is_refused(glass_folder) -> None:
    model = opened(glass_folder)
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward(retain_graph=True)
    with pytest.raises(UsageError, match="a second backward of one forward"):
        loss.backward()


def test_a_forward_that_a_library_replaced_trains_as_the_models_own(glass_folder) -> None:
    """TRL's trainers put a forward of their own in place of the model's: the base's decoder, and a loss by itself."""
    plain = losses_of(opened(glass_folder))
    model = opened(glass_folder)

    def forward(input_ids, labels):
        hidden = model.base_model(input_ids=input_ids).last_hidden_state
        logits = model.get_output_embeddings()(hidden)
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return {"loss": loss, "logits": None}

    class Wrapped(dict):
        loss = property(lambda self: self["loss"])

    model.forward = lambda **given: Wrapped(forward(**given))
    assert losses_of(model) == pytest.approx(plain, rel=1e-4)
    model.eval()
    assert float(model(input_ids=IDS, labels=IDS).loss) < plain[0]


def test_a_training_forward_of_the_base_itself_is_refused(glass_folder) -> None:
    model = opened(glass_folder)
    for call in (model.base, model.base.model):
        with pytest.raises(UsageError, match="call the AdapterModel"):
            call(input_ids=IDS)
        with torch.no_grad():
            call(input_ids=IDS)
    base = model.detach()
    base(input_ids=IDS)
