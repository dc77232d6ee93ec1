"""What ``meft-plan estimate`` may be asked, and which option is of which method."""

from __future__ import annotations

from typing import Annotated, Any, cast

from pydantic import AfterValidator, BeforeValidator, Field

from meft.planner.base.dtypes import AdapterDtype, WeightsDtype
from meft.planner.base.errors import UsageError
from meft.planner.base.schema import Record
from meft.planner.front.options import MAX_RANK, BatchSize, Chunks, Depth, GradAccum, Rows, SeqLen, Width
from meft.planner.records.peft_methods import split_method
from meft.planner.records.plan import Attention, RowsInBackward, TokensSee
from meft.planner.records.routing import BalanceLoss, CapacityFactor, FirstStage, Jitter, Routing
from meft.planner.records.setup import (
    METHOD_NAMES,
    Autocast,
    LossName,
    MethodName,
    OffloadName,
    OptimizerName,
    optimizer_name,
)
from meft.planner.terms.lengths import Batching

_DENSE = ("parallel-adapter", "lora", "qlora", "full", "bitfit", "lst", "peft")
LORA = ("lora", "qlora")
_ONLY_FOR: dict[str, tuple[str, ...]] = {
    "peft_arg": ("peft",),
    "peft_config": ("peft",),
    "rank": LORA,
    "target_modules": LORA,
    "lora_dropout": LORA,
    "kbit_preparation": LORA,
    "trl_casts": LORA,
    "reentrant": _DENSE,
    "repeated_heads": _DENSE,
    "offload": _DENSE,
    "torch_compile": ("lora", "full"),
    "reduction": ("lst",),
    "dropped_layers": ("lst",),
    "adapter_width": ("meft", "parallel-adapter"),
    "adapter_dtype": ("meft", "parallel-adapter", *LORA),
    "top_k": ("meft",),
    "active_rows": ("meft",),
    "prefetch_depth": ("meft",),
    "routing": ("meft",),
    "capacity_factor": ("meft",),
    "router_jitter": ("meft",),
    "balance_loss": ("meft",),
    "first_stage": ("meft",),
    "rows_in_backward": ("meft",),
    "tokens_see": ("meft",),
    "token_chunks": ("meft",),
    "hot_rows": ("meft",),
    "bf16_copy": ("meft",),
    "autocast": _DENSE,
    "optimizer": _DENSE,
    "optimizer_in_backward": _DENSE,
    "master_weights": _DENSE,
    "kernels": _DENSE,
    "loss": _DENSE,
    "keep_outputs": _DENSE,
    "padding": _DENSE,
    "lengths": _DENSE,
    "tokenizer": _DENSE,
    "batching": _DENSE,
}
SAYS_NOTHING: dict[str, tuple[object, ...]] = {
    "offload": ("none",),
    "lora_dropout": (0.0,),
    "kbit_preparation": (False,),
    "adapter_dtype": ("fp32",),
    "torch_compile": (False,),
    "prefetch_depth": (0,),
    "hot_rows": (0,),
    "bf16_copy": (False,),
    "autocast": ("none",),
    "optimizer": ("adamw",),
    "loss": ("hf",),
    "keep_outputs": (False,),
    "padding": (False,),
}
"""Values that say only what is so with any method that does not have the option: giving them is no contradiction."""


def _known_method(method: str) -> str:
    """``peft`` alone is what a config file says."""
    name = method.partition(":")[0]
    if name not in METHOD_NAMES or (name != "peft" and name != method):
        raise ValueError(f"no such method; there are {', '.join(METHOD_NAMES[:-1])} and peft:TYPE")
    return method


class EstimateRequest(Record):
    """What ``--request`` takes, and what the options amount to. ``None`` is what was not said."""

    method: Annotated[str, AfterValidator(_known_method)]
    """A name, or ``peft:TYPE``."""
    peft_arg: dict[str, Any] | tuple[str, ...] | None = None
    peft_config: str | None = None
    model: str | None = None
    gpu: str | None = None
    gpu_mem: int | str | None = None
    host_mem: int | str | None = None
    context_overhead: int | str | None = None
    host: str | None = None
    link: str | None = None
    sparsity: str | None = None
    rank: Annotated[int, Field(ge=1, le=MAX_RANK, strict=True)] | None = None
    target_modules: tuple[str, ...] | str | None = None
    lora_dropout: Annotated[float, Field(ge=0.0, lt=1.0)] | None = None
    adapter_width: Width | None = None
    reduction: Annotated[int, Field(ge=2, strict=True)] | None = None
    dropped_layers: Annotated[int, Field(ge=0, strict=True)] | None = None
    top_k: Width | None = None
    active_rows: Width | None = None
    prefetch_depth: Depth | None = None
    routing: Routing | None = None
    capacity_factor: CapacityFactor | None = None
    router_jitter: Jitter | None = None
    balance_loss: BalanceLoss | None = None
    first_stage: FirstStage | None = None
    rows_in_backward: RowsInBackward | None = None
    tokens_see: TokensSee | None = None
    token_chunks: Chunks | None = None
    hot_rows: Rows | None = None
    bf16_copy: bool | None = None
    weights_dtype: WeightsDtype | None = None
    double_quant: bool | None = None
    kbit_preparation: bool | None = None
    trl_casts: bool | None = None
    reentrant: bool | None = None
    autocast: Autocast | None = None
    adapter_dtype: AdapterDtype | None = None
    batch_size: BatchSize = 2
    seq_len: SeqLen = 256
    grad_accum: GradAccum | None = None
    activation_checkpointing: bool | None = None
    offload: OffloadName | None = None
    torch_compile: bool | None = None
    attention: Attention | None = None
    repeated_heads: bool | None = None
    packed: bool | None = None
    optimizer: Annotated[OptimizerName | None, BeforeValidator(optimizer_name)] = None
    optimizer_in_backward: bool | None = None
    master_weights: bool | None = None
    kernels: tuple[str, ...] | str | None = None
    loss: LossName | None = None
    padding: bool | None = None
    lengths: str | None = None
    tokenizer: str | None = None
    batching: Batching | None = None
    keep_outputs: bool | None = None

    @property
    def kind(self) -> MethodName:
        """The method; of those of ``peft`` that."""
        return cast(MethodName, split_method(self.method)[0])

    @property
    def target_names(self) -> tuple[str, ...] | None:
        """The targets as a list, however they were given."""
        if isinstance(self.target_modules, str):
            return tuple(self.target_modules.replace(",", " ").split())
        return self.target_modules

    @property
    def kernel_names(self) -> tuple[str, ...]:
        """The kernels as a list, however they were given."""
        if isinstance(self.kernels, str):
            return tuple(self.kernels.replace(",", " ").split())
        return self.kernels or ()


def check_applies(asked: EstimateRequest) -> None:
    """Raise :class:`UsageError` for an option that is not of the method."""
    for name, methods in _ONLY_FOR.items():
        value = getattr(asked, name)
        if value is None or asked.kind in methods:
            continue
        if value in SAYS_NOTHING.get(name, ()):
            continue
        option = "--" + name.replace("_", "-")
        raise UsageError(f"{option} does not go with --method {asked.kind}; it is of {', '.join(methods)}")


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
