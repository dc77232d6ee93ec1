"""A :class:`~meft.planner.records.setup.TrainingSetup` opened as a session: what is trained, beside which weights."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from meft.planner.base.errors import UsageError
from meft.planner.base.packages import require_packages
from meft.planner.models.architecture import ModelShape
from meft.planner.models.catalogue import CONFIG_NAME, read_config, text_part
from meft.planner.models.shapes import shape_of
from meft.planner.records.ladder import kept_layers, side_shape
from meft.planner.records.peft_methods import PeftMethod
from meft.planner.records.plan import DeviceMemory, Plan
from meft.planner.records.setup import TrainingSetup, plan_of_setup
from meft.runtime.device.device import Device, EmulatedDevice
from meft.runtime.host.optimizer import AdamWSettings
from meft.runtime.methods.peft_methods import attach_peft, trained_of
from meft.runtime.session.baselines import Attach, Baseline, BaselineSession, open_baseline, open_trained
from meft.runtime.session.model_loading import load_frozen_model

NO_CHECKPOINTING = ("PREFIX_TUNING",)
"""Types whose trained keys and values are a cache, which a recomputed layer does not see."""
ALL_LINEAR = ("all-linear",)
"""Target modules: every linear layer but the head, as ``peft`` finds them."""


def model_shape(folder: Path) -> ModelShape:
    """Of the model in a folder."""
    return shape_of(text_part(read_config(folder / CONFIG_NAME)), name=folder.name)


def plan_of(setup: TrainingSetup, *, budget_bytes: int) -> Plan:
    """As much of a plan as a session needs; nothing is predicted in it."""
    width = setup.adapter_width or 1
    plan = plan_of_setup(setup, adapter_width=width, active_rows=width, budget_bytes=budget_bytes)
    incomplete: type[Any] = DeviceMemory
    memory = incomplete.model_construct(allocator_budget_bytes=budget_bytes)
    return plan.model_copy(update={"prediction": plan.prediction.model_copy(update={"device_memory": memory})})


def check_method(setup: TrainingSetup) -> None:
    """Raise :class:`UsageError` for what cannot be trained."""
    if setup.method == "qlora" and setup.weights_dtype != "nf4":
        raise UsageError(f"--weights-dtype {setup.weights_dtype}: qlora has nf4 weights; use --method lora")
    if setup.method in ("full", "bitfit") and setup.weights_dtype == "nf4":
        raise UsageError(f"--method {setup.method}: it trains the model's own weights, which nf4 cannot be; give fp32")
    if setup.method == "lst":
        side_shape(setup.model, setup.reduction or 0)
        kept_layers(setup.model.num_layers, setup.dropped_layers)
        if setup.weights_dtype == "nf4":
            raise UsageError("--weights-dtype nf4: the side network is pruned from weights that are not quantized")
        if setup.activation_checkpointing:
            raise UsageError("--activation-checkpointing: lst keeps nothing of the model's layers; leave it out")
    if setup.weights_dtype == "nf4":
        require_packages("bitsandbytes", "accelerate", purpose="nf4 weights")
    peft = setup.peft
    if peft is not None and setup.activation_checkpointing and peft.enum_name in NO_CHECKPOINTING:
        raise UsageError(
            f"--activation-checkpointing: peft:{peft.peft_type} has its prefix in the key-value cache, which a layer "
            f"that is computed again does not see; leave it out"
        )


def load_model(setup: TrainingSetup, folder: Path, *, device_kind: str) -> nn.Module:
    """The frozen model in the setup's dtype: nf4 is quantized by bitsandbytes as it loads, whatever the device."""
    return load_frozen_model(plan_of(setup, budget_bytes=1), folder, device_kind=device_kind)


def open_method(
    setup: TrainingSetup,
    model: nn.Module,
    device: Device,
    *,
    seed: int,
    settings: AdamWSettings | None = None,
) -> BaselineSession:
    """Put ``model`` on the device with what the setup's method trains.

    Raises:
        UsageError: the method cannot be attached to this model.
    """
    check_method(setup)
    plan = plan_of(setup, budget_bytes=device.budget_bytes)
    if setup.method == "peft" and isinstance(device, EmulatedDevice):
        device.books.takes_host_tensors = True
    special: dict[str, Attach] = {
        "lora": partial(_with_lora, setup=setup),
        "qlora": partial(_with_lora, setup=setup),
        "peft": partial(_with_peft, setup=setup),
        "bitfit": only_biases,
        "lst": partial(with_ladder, setup=setup),
    }
    if setup.method in special:
        return open_trained(special[setup.method], plan, model, device, seed=seed, settings=settings)
    names: dict[str, Baseline] = {"parallel-adapter": "parallel-adapter", "full": "full"}
    if setup.method not in names:
        raise UsageError(f"--method {setup.method}: it is trained by its plan: meft-run plan.json")
    return open_baseline(names[setup.method], plan, model, device, seed=seed, settings=settings)


def _with_lora(model: nn.Module, setup: TrainingSetup) -> tuple[nn.Module, list[nn.Parameter]]:
    """LoRA with alpha twice the rank and no dropout, beside quantized weights too."""
    names: list[str] | str = list(setup.target_modules) if setup.target_modules != ALL_LINEAR else ALL_LINEAR[0]
    arguments = {"r": setup.rank, "lora_alpha": 2 * (setup.rank or 0), "target_modules": names}
    adapted = attach_peft(model, PeftMethod(peft_type="lora", arguments=arguments))
    return adapted, trained_of(adapted)


def _with_peft(model: nn.Module, setup: TrainingSetup) -> tuple[nn.Module, list[nn.Parameter]]:
    assert setup.peft is not None
    adapted = attach_peft(model, setup.peft)
    trained = trained_of(adapted)
    if not trained:
        raise UsageError(f"--method peft:{setup.peft.peft_type}: with these settings it trains nothing")
    return adapted, trained


def with_ladder(model: nn.Module, setup: TrainingSetup) -> tuple[nn.Module, list[nn.Parameter]]:
    """Ladder side tuning, of the setup's size."""
    from meft.runtime.methods.ladder import attach_ladder

    assert setup.reduction is not None
    return attach_ladder(model, side_shape(setup.model, setup.reduction), dropped=setup.dropped_layers)


def only_biases(model: nn.Module) -> tuple[nn.Module, list[nn.Parameter]]:
    """BitFit (Ben Zaken et al., 2022): every bias that the model has, and nothing else.

    Raises:
        UsageError: it has none.
    """
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.rpartition(".")[2] == "bias")
    trained = trained_of(model)
    if not trained:
        raise UsageError(
            "--method bitfit: this model has no biases (Llama's and SmolLM2's layers have none), so there is nothing "
            "to train; peft:ln-tuning trains its norms"
        )
    return model, trained
