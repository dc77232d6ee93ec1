"""What is not said of a compiled run, and why."""

from __future__ import annotations

from meft.planner.base.errors import UsageError
from meft.planner.front.asked import EstimateRequest
from meft.planner.records.setup import TrainingSetup
from meft.planner.terms.activations import attention_used

_LOSSES = ("hf", "hf-shifted-logits")


def check_range(asked: EstimateRequest, *, verify: bool, probe: bool) -> None:
    """Raise :class:`UsageError` where what is asked beside ``--torch-compile`` would answer for an eager run."""
    beside = {"--verify": verify, "--probe": probe}
    for option, is_given in beside.items():
        if is_given:
            raise UsageError(f"--torch-compile: {option} runs the model's code uncompiled; leave one of them out")
    if asked.lengths is not None:
        raise UsageError(
            "--torch-compile: --lengths is open as to which shapes are compiled anew; give the longest by --seq-len"
        )


def check_compiled(setup: TrainingSetup, *, traced: bool) -> None:
    """Raise :class:`UsageError` for a run of whose compiled form neither end is known; ``traced``: it is not simulated.

    The first that applies is named, with what to do instead.
    """
    grouped = setup.model.num_heads != setup.model.num_kv_heads
    sdpa = attention_used(setup.model, setup.attention) == "sdpa"
    plain = setup.weights_dtype == "fp32" and setup.autocast == "none"
    unknown = {
        f"{setup.model.name} has no closed form, and its trace is of uncompiled code; leave it out": traced,
        "4-bit layers break its graph where their version does; leave it out, or give 16-bit weights": (
            setup.weights_dtype == "nf4" or setup.model.stored is not None
        ),
        f"what it makes of fused {', '.join(setup.kernels)} is theirs; leave out --kernels": bool(setup.kernels),
        f"what it makes of {setup.loss} is that library's; give --loss {' or '.join(_LOSSES)}": (
            setup.loss not in _LOSSES
        ),
        f"--offload {setup.offload} is told of tensors that a compiled graph does not have; leave it out": (
            setup.offload != "none"
        ),
        "a compiled backward hands out all gradients at its end; leave out --optimizer-in-backward": (
            setup.optimizer_in_backward
        ),
        "which kernel takes grouped heads in fp32 is not known; give 16-bit weights, or --autocast bf16": (
            plain and grouped and sdpa
        ),
    }
    for why, applies in unknown.items():
        if applies:
            raise UsageError(f"--torch-compile: {why}")
