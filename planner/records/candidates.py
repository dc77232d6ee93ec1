"""What the term functions are given: one decision as numbers, or all that a search weighs as arrays."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from meft.planner.base.quantities import Flags, Ints
from meft.planner.records.plan import Decision


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Candidates:
    """Each field is what :class:`~meft.planner.records.plan.Decision` says of it: a number, or an array of many
    decisions'.

    Arrays broadcast against each other, so a choice needs its own axis only.
    """

    adapter_width: Ints
    top_k: Ints
    prefetch_depth: Ints
    active_rows_cap: Ints
    num_experts: Ints
    num_probes: Ints
    key_experts: Flags
    """A router on the device gates the rows."""
    retained: Flags
    """Rows stay on the device until backward; otherwise they are fetched again."""
    activation_checkpointing: Flags
    cached_rows: Ints = 0
    gradients_on_device: Flags = False
    bf16_copy: Flags = False
    hot_rows: Ints = 0
    own_rows: Flags = False
    """A token's output uses its own best K rows alone."""
    gather_chunks: Ints = 1
    token_chunks: int = 1
    """One number for all."""
    means: Flags = False
    """The host finds experts by the means of their keys."""
    owned: bool = False
    """Of several machines each has its own rows; the same for all."""
    switch: Flags = False
    """Of those with a router: it sends a token to one expert, and computes in fp32."""
    routers: int = 1
    """``[N, D]`` that a layer's router has; one number for all."""
    bound: bool = False
    """The host's kernels have cores of their own; the same for all."""

    @property
    def in_experts(self) -> Flags:
        """Rows lie in experts, of which a token looks through some."""
        return self.key_experts | self.means

    @property
    def router_rows(self) -> Ints:
        """Rows of a layer's router: ``N``, or twice that with a light router below the other."""
        return self.routers * self.num_experts

    @property
    def refetched(self) -> Flags:
        """Rows are fetched again in backward."""
        return not self.retained if isinstance(self.retained, bool) else ~self.retained

    @classmethod
    def of(cls, decision: Decision) -> Candidates:
        """One decision, in numbers."""
        return cls(
            adapter_width=decision.adapter_width,
            top_k=decision.top_k,
            prefetch_depth=decision.prefetch_depth,
            active_rows_cap=decision.active_rows_cap,
            num_experts=decision.num_experts,
            num_probes=decision.num_probes,
            key_experts=decision.needs.gated,
            retained=decision.rows_in_backward == "retained",
            activation_checkpointing=decision.activation_checkpointing,
            cached_rows=decision.cached_rows,
            gradients_on_device=decision.gradients_on_device,
            bf16_copy=decision.bf16_copy,
            hot_rows=decision.hot_rows,
            own_rows=decision.tokens_see == "own",
            gather_chunks=decision.gather_chunks,
            token_chunks=decision.token_chunks,
            means=decision.needs.means,
            switch=decision.needs.one_expert,
            owned=decision.rows == "owned",
            routers=decision.needs.routers,
            bound=decision.bind_cores,
        )


def same_for_all(flags: Flags) -> bool:
    """The one value of a choice that is alike in all candidates; raises :class:`ValueError` where it is not."""
    if np.any(flags) != np.all(flags):
        raise ValueError(f"a choice that must be the same for all candidates is not: {flags}")
    return bool(np.any(flags))
