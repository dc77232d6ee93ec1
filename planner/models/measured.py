"""What is known of a model that no closed form describes: read from its real class, and from traces of its code.

Letters: ``B`` batch, ``S`` sequence length, ``T = B*S`` tokens, ``L`` layers, ``D`` hidden size.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from meft.planner.base.schema import MAX_WHOLE, Count, Index, Record

Signed = Annotated[int, Field(ge=-MAX_WHOLE, le=MAX_WHOLE, strict=True)]


class MeasuredLinear(Record):
    """The linear modules of one name in all blocks: ``count`` of them, alike."""

    name: str
    place: Literal["attention", "ffn"]
    inputs: Count
    outputs: Count
    bias: bool
    count: Count


class Measured(Record):
    """Counts of the real class, built by transformers on the meta device."""

    class_name: str
    parameters: Count
    active_parameters: Count
    """Those that a token meets: of a mixture of experts, the chosen experts' and all that is no expert."""
    block_parameters: Count
    """Matrices of all blocks."""
    attention_parameters: Index
    """Of them those outside of the FFNs, a layer's mean."""
    active_ffn_parameters: Index
    """Of the FFNs, those that a token meets, a layer's mean."""
    experts: Index = 0
    """Experts of a layer; 0: no mixture."""
    active_experts: Index = 0
    linears: tuple[MeasuredLinear, ...] = ()
    checkpointing: bool = True
    """Whether the class can recompute its blocks in backward."""
    sdpa: bool = True
    """Whether the class runs with sdpa attention; else it is eager."""
    without_ffn: str | None = None
    """Why no adapter can sit beside its FFNs; None: it can."""


class TracedPhases(Record):
    """Bytes of the frozen model in each phase of a step: ``at`` the traced batch, ``more`` per further sequence.

    What the adapter adds is not in them (:mod:`meft.planner.memory.traced`), so they may be below zero where that is
    an upper bound.
    """

    resident: tuple[Signed, Signed]
    forward: tuple[Signed, Signed]
    loss: tuple[Signed, Signed]
    backward: tuple[Signed, Signed]
    optimizer_step: tuple[Signed, Signed]
    beyond_allocated: Index
    """What the allocator reserved above the peak of what was allocated."""


class TracedTerms(Record):
    """Terms of device memory, fitted from traces of the real model's code at two batch sizes."""

    batch_size: Count
    seq_len: Count
    plain: TracedPhases | None = None
    """Without activation checkpointing; None: not traced."""
    checkpointed: TracedPhases | None = None
