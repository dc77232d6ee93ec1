"""Two steps of a setup on a card that is there, from random weights: what it really takes."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from meft.planner.base.errors import DeviceOutOfMemory, MachineError, UsageError
from meft.planner.records.setup import TrainingSetup
from meft.runtime.adapter.blocks import decoder_blocks
from meft.runtime.device.device import CudaDevice, Device
from meft.runtime.device.nvml import NvmlReader, NvmlUnavailable
from meft.runtime.session.model_loading import COMPUTE_DTYPES
from meft.runtime.trace.loading import build_model
from meft.runtime.trace.methods import attach_method
from meft.runtime.trace.optimizers import make_optimizer
from meft.runtime.trace.stage import MICRO_BATCHES, STEPS

METHODS = ("full", "lora", "parallel-adapter")
OPTIMIZERS = ("adamw", "adamw-fused", "sgd", "adafactor", "muon")
"""Those whose own code runs; the others have stand-ins in a trace, which would measure nothing."""


def probe_setup(
    setup: TrainingSetup,
    config: dict[str, Any],
    *,
    budget_bytes: int,
    device: Device | None = None,
    nvml: NvmlReader | NvmlUnavailable | None = None,
) -> dict[str, int | None]:
    """Peaks in bytes of two steps, ``allocated`` and ``reserved``, and what the process holds beside torch's allocator
    (``context``, None where the driver does not tell). All None where the device ran out of memory.

    Raises :class:`UsageError` for a setup whose kernels are only stood for, :class:`MachineError` without a card.
    """
    _check(setup)
    if device is None:
        if not torch.cuda.is_available():
            raise MachineError(
                "--probe: torch sees no CUDA device here; leave it out, or give --verify, which needs none"
            )
        nvml = NvmlReader.open(torch.cuda.current_device())
        device = CudaDevice(budget_bytes)
    try:
        _run(setup, config, device)
    except DeviceOutOfMemory:
        return dict.fromkeys(("allocated", "reserved", "context"))
    peaks = device.peaks()
    reading = None if nvml is None else nvml.process_memory(at_least_bytes=peaks.reserved_bytes).num_bytes
    context = None if reading is None else max(reading - peaks.reserved_bytes, 0)
    return {"allocated": peaks.allocated_bytes, "reserved": peaks.reserved_bytes, "context": context}


def _check(setup: TrainingSetup) -> None:
    refused = {
        f"--weights-dtype {setup.weights_dtype}": setup.weights_dtype not in COMPUTE_DTYPES,
        f"--method {setup.method}": setup.method not in METHODS,
        f"--loss {setup.loss}": setup.loss != "hf",
        f"--kernels {','.join(setup.kernels)}": bool(setup.kernels),
        f"--optimizer {setup.optimizer}": setup.optimizer not in OPTIMIZERS,
        "--master-weights": setup.master_weights,
        "--optimizer-in-backward": setup.optimizer_in_backward,
        "--kbit-preparation": setup.kbit_preparation,
        "--attention flash": setup.attention == "flash",
        f"--offload {setup.offload}": setup.offload != "none",
        "--repeated-heads": setup.repeated_heads,
    }
    for option, is_refused in refused.items():
        if is_refused:
            raise UsageError(
                f"--probe: {option} is not run, only stood for; give --verify, or measure a run of your own"
            )


def _run(setup: TrainingSetup, config: dict[str, Any], device: Device) -> None:
    with device.host():
        model = attach_method(build_model(setup, config), setup)
        if setup.activation_checkpointing:
            model.activation_checkpointing_enable()  # type: ignore[operator]
    model = device.adopt(model).train()
    device.reset_peaks()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    in_block = {id(each) for each in decoder_blocks(model).parameters() if each.dim() > 1}
    optimizer = make_optimizer(setup.optimizer, parameters, in_block=in_block)
    with device.scope():
        for _ in range(STEPS):
            outputs: Any = None
            for _ in range(min(setup.grad_accum, MICRO_BATCHES)):
                outputs = _micro_batch(model, setup, device)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            del outputs
    device.synchronize()


def _micro_batch(model: nn.Module, setup: TrainingSetup, device: Device) -> Any:
    shape = (setup.batch_size, setup.seq_len)
    names = ("input_ids", "labels", *(["attention_mask"] if setup.padded else []))
    batch = {name: torch.ones(shape, dtype=torch.int64, device=device.torch_device) for name in names}
    with _autocast(setup, device):
        outputs = model(**batch)
    outputs.loss.backward()
    return outputs if setup.outputs_kept else None


def _autocast(setup: TrainingSetup, device: Device) -> AbstractContextManager[Any]:
    if setup.autocast == "none":
        return nullcontext()
    return torch.autocast(device.torch_device.type, COMPUTE_DTYPES[setup.autocast])
