"""One training run whose memory is asked for, as a measured run would state itself."""

from __future__ import annotations

from typing import Literal, get_args

from meft.planner.base.dtypes import AdapterDtype, WeightsDtype
from meft.planner.base.schema import Count, Index, Record
from meft.planner.models.architecture import ModelShape
from meft.planner.models.kernels import KernelName
from meft.planner.records.peft_methods import PEFT_PREFIX, PeftMethod
from meft.planner.records.plain import plain_decision, plan_with_rows
from meft.planner.records.plan import Attention, Plan, Request

MethodName = Literal["meft", "parallel-adapter", "lora", "qlora", "full", "bitfit", "lst", "peft"]
METHOD_NAMES: tuple[MethodName, ...] = get_args(MethodName)
OptimizerName = Literal[
    "adamw",
    "adamw-fused",
    "adamw-8bit",
    "paged-adamw-8bit",
    "paged-adamw-32bit",
    "lion-32bit",
    "lion-8bit",
    "paged-lion-8bit",
    "adafactor",
    "muon",
    "galore",
    "apollo",
    "apollo-mini",
    "sgd",
]
TRANSFORMERS_OPTIMIZERS: dict[str, OptimizerName] = {
    "adamw_torch": "adamw",
    "adamw_torch_fused": "adamw-fused",
    "adamw_bnb_8bit": "adamw-8bit",
    "adamw_8bit": "adamw-8bit",
    "paged_adamw_8bit": "paged-adamw-8bit",
    "paged_adamw_32bit": "paged-adamw-32bit",
    "paged_adamw": "paged-adamw-32bit",
    "lion_32bit": "lion-32bit",
    "lion_8bit": "lion-8bit",
    "paged_lion_8bit": "paged-lion-8bit",
    "galore_adamw": "galore",
    "apollo_adamw": "apollo-mini",
}
"""What ``TrainingArguments.optim`` calls them, where that is another name."""


def optimizer_name(name: object) -> object:
    """The optimizer's name here; any other stays as it is, to be refused with the list of those that are known."""
    return TRANSFORMERS_OPTIMIZERS.get(name, name) if isinstance(name, str) else name


LossName = Literal[
    "hf",
    "hf-shifted-logits",
    "fused-ce",
    "fused-ce-shifted",
    "fused-ce-upcast",
    "fused-linear-ce",
    "trl-chunked",
    "torchtune-chunked",
]
Autocast = Literal["bf16", "fp16", "none"]
OffloadName = Literal["none", "save-on-cpu", "trl", "unsloth"]


class TrainingSetup(Record):
    """The method, the dtypes and the workload of one run. What a method has no use for is null or empty.

    ``optimizer``: ``adamw`` is torch's multi-tensor (foreach) AdamW, ``adamw-fused`` its fused one, the 8-bit ones are
    those of bitsandbytes, Lion's included (paged ones keep their states outside the caching allocator), ``adafactor``
    transformers' without a first moment, ``muon`` torch's for the matrices of linear layers beside its AdamW for the
    rest; ``galore``, ``apollo`` and ``apollo-mini`` are their authors' packages over the same matrices, with rank 128,
    256 and 1, and AdamW in the same code for the rest; ``sgd`` has no momentum.

    ``loss``: ``hf`` is transformers' own (logits upcast to fp32), ``hf-shifted-logits`` that of versions that shifted
    the logits instead of the labels (4.48), and so copied them in fp32; ``fused-ce`` keeps logits in the compute dtype
    and makes their gradient in place, ``fused-ce-shifted`` and ``fused-ce-upcast`` do so over upcast, shifted logits of
    earlier versions; ``fused-linear-ce`` and ``trl-chunked`` never hold the logits, ``torchtune-chunked`` upcasts an
    eighth at a time. Whose they are, and since when, says ``LOSS_KINDS`` of :mod:`meft.planner.simulation.losses`.
    """

    model: ModelShape
    method: MethodName
    rank: Count | None = None
    target_modules: tuple[str, ...] = ()
    """Names of the model's own linear modules that LoRA adapts, such as ``q_proj``."""
    lora_dropout: bool = False
    """LoRA drops out of its inputs, which keeps a mask and a copy for every target."""
    adapter_width: Count | None = None
    top_k: Count | None = None
    active_rows: Count | None = None
    """MEFT: rows per layer that every micro-batch activates."""
    weights_dtype: WeightsDtype = "bf16"
    double_quant: bool = False
    kbit_preparation: bool = False
    """What PEFT's ``prepare_model_for_kbit_training`` does: every 16-bit parameter that is left becomes fp32."""
    trl_casts: bool = False
    """What TRL 0.x does to a 4-bit model that trains with ``bf16=True``: norms are fp32, embeddings and head bf16."""
    autocast: Autocast = "none"
    adapter_dtype: AdapterDtype = "fp32"
    batch_size: Count = 1
    seq_len: Count = 1024
    grad_accum: Count = 1
    activation_checkpointing: bool = False
    reentrant: bool | None = None
    """Which kind of activation checkpointing; null: torch's default, the reentrant one, where PEFT prepares a quantized
    model, and transformers' default elsewhere."""
    offload: OffloadName = "none"
    """Whose way of keeping activations on the host: see :mod:`meft.planner.terms.offload`."""
    compiled: bool = False
    """By torch.compile, which fuses and computes again what it sees fit: see :mod:`meft.planner.fusion`."""
    attention: Attention = "sdpa"
    repeated_heads: bool = False
    """Grouped key and value heads are written out for every query head before any kernel, as transformers did it before
    sdpa, and up to 4.47 before flash attention in Mistral, Qwen 2 and Phi-3 (not in LLaMA or Gemma)."""
    optimizer: OptimizerName = "adamw"
    kernels: tuple[KernelName, ...] = ()
    """Fused kernels in the model's place: see :mod:`meft.planner.models.kernels`."""
    optimizer_in_backward: bool = False
    """Each parameter is updated as soon as its gradient is there, which then goes (torchtune's recipes)."""
    master_weights: bool = False
    """16-bit trained parameters have fp32 copies that the optimizer updates (DeepSpeed's and Apex's O2 way)."""
    loss: LossName = "hf"
    padded: bool = False
    """Batches are padded, so that a mask tensor exists."""
    packed: bool = False
    """Sequences hold several documents, told apart by position ids that begin anew; there is no KV cache then."""
    peft: PeftMethod | None = None
    """Of method ``peft``: which, and how it is configured."""
    reduction: Count | None = None
    """Of method ``lst``: how often narrower than the model its side network is."""
    dropped_layers: Index = 0
    """Of method ``lst``: layers that the side network has no block beside."""
    emulated: bool = False
    """As ``meft-run baseline`` runs it on the emulated device: the CPU's operators, outputs let go, AdamW one parameter
    at a time after clipping by the norm."""
    outputs_kept: bool = True
    """The loop holds on to the model's outputs, so that logits and (without checkpointing) the KV cache stay alive."""

    @property
    def checkpoints_reentrantly(self) -> bool:
        """Transformers names the kind, PEFT's preparation of a quantized model does not: torch takes the reentrant
        one."""
        if self.reentrant is not None:
            return self.reentrant
        if self.offload == "unsloth":
            return True
        return self.kbit_preparation and self.weights_dtype == "nf4"

    @property
    def tokens(self) -> int:
        """``T = B * S``."""
        return self.batch_size * self.seq_len

    @property
    def label(self) -> str:
        """The method as users write it."""
        return self.method if self.peft is None else PEFT_PREFIX + self.peft.peft_type

    @property
    def positions(self) -> int:
        """Positions that are told apart: those of one sequence stand for all, unless documents are packed."""
        return self.tokens if self.packed else self.seq_len


def plan_of_setup(
    setup: TrainingSetup, *, adapter_width: int, active_rows: int, top_k: int = 1, budget_bytes: int
) -> Plan:
    """As much of a plan as opening or tracing a setup needs, for one that leaves the rest open. It is not a plan that
    anyone could run elsewhere: nothing is predicted in it."""
    decision = plain_decision(
        adapter_width=adapter_width,
        active_rows=active_rows,
        top_k=top_k,
        activation_checkpointing=setup.activation_checkpointing,
    )
    request = Request(
        model=setup.model,
        gpu="any",
        host="any",
        link="any",
        sparsity="given",
        gpu_mem_bytes=budget_bytes,
        host_mem_bytes=budget_bytes,
        host_mem_basis="given",
        batch_size=setup.batch_size,
        seq_len=setup.seq_len,
        grad_accum=setup.grad_accum,
        weights_dtype=setup.weights_dtype,
        double_quant=setup.double_quant,
        adapter_dtype=setup.adapter_dtype,
        attention=setup.attention,
        packed=setup.packed,
    )
    return plan_with_rows(request, decision, active_rows)
