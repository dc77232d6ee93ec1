"""Fused kernels that stand in for parts of a model: who brings which, what each replaces, and where it applies.

What is replaced is read from Liger 0.8 (``monkey_patch.py``), Unsloth's ``models/llama.py`` and ``kernels/``, and
fms-acceleration's ``foak`` plugin:

- ``rms-norm``: one kernel that keeps its input and a factor per row, and writes its gradient over the incoming one.
- ``swiglu``: gate, activation and product in one, which keeps gate and up and writes their gradients over them.
- ``rope``: query and key rotated where they lie, and their gradients back.
- ``lora``: LoRA and the layers beside it in one function for each input (:mod:`meft.planner.simulation.lora`), where
  all layers of that input are adapted. foak has it beside 4-bit weights, dropout or not; Unsloth beside any, without
  dropout.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, get_args

from meft.planner.base.errors import UsageError, unknown_name
from meft.planner.models.architecture import ModelShape

KernelName = Literal["rms-norm", "swiglu", "rope", "lora"]
KERNEL_NAMES: tuple[KernelName, ...] = get_args(KernelName)
BROUGHT_BY: dict[str, tuple[KernelName, ...]] = {
    "liger": ("rms-norm", "swiglu", "rope"),
    "unsloth": ("rms-norm", "swiglu", "rope"),
    "foak": ("rms-norm", "rope"),
}
LOSS_OF = {"liger": "fused-linear-ce", "unsloth": "fused-ce", "foak": "fused-ce"}
"""The loss that comes with them, unless another is asked for."""
NORM_OUT_OF_PLACE = frozenset({"gemma2", "gemma3_text"})
"""Model types whose norms' gradient is needed beside the incoming one: Liger makes a new tensor."""
WHOLE_ROTATIONS = frozenset(
    {"llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "olmo2", "granite", "smollm3"}
)
"""Model types whose heads are rotated as LLaMA's are; but for Phi-3 their queries, keys and values are three layers."""


def resolve_kernels(shape: ModelShape, names: Iterable[str]) -> tuple[KernelName, ...]:
    """The kernels that ``names`` mean on this model: of a library those that apply, of its own name one that must.

    Raises :class:`UsageError` for an unknown name, and for a kernel that the model has no place for.
    """
    found: set[KernelName] = set()
    for name in (each.strip() for each in names):
        if name in BROUGHT_BY:
            found |= {kernel for kernel in BROUGHT_BY[name] if applies(shape, kernel)}
            continue
        kernel = next((each for each in KERNEL_NAMES if each == name), None)
        if kernel is None:
            raise unknown_name("kernel in --kernels", name, [*BROUGHT_BY, *KERNEL_NAMES])
        if not applies(shape, kernel):
            raise UsageError(f"--kernels {name}: {shape.name} ({shape.model_type}) has no place for it")
        found.add(kernel)
    return tuple(name for name in KERNEL_NAMES if name in found)


def fused_lora_of(names: Iterable[str], *, quantized: bool, dropout: bool) -> bool:
    """Whether a library among ``names`` fuses LoRA in this run: foak beside 4-bit weights, Unsloth without dropout."""
    return ("foak" in names and quantized) or ("unsloth" in names and not dropout)


def applies(shape: ModelShape, kernel: KernelName) -> bool:
    """Whether a model has what the kernel replaces."""
    if kernel == "rms-norm":
        return shape.norm == "rmsnorm"
    if kernel == "swiglu":
        return shape.gated_mlp
    if kernel == "lora":
        return shape.model_type in WHOLE_ROTATIONS and shape.model_type != "phi3"
    return shape.model_type in WHOLE_ROTATIONS and shape.rotary_fraction == 1.0 and not shape.rotary_pause
