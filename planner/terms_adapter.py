"""Device bytes of what is trained, term by term: the sparse adapter of MEFT, and the dense baselines.

Every term is a short pure function of ints or numpy int64 arrays alike.

Letters: ``T`` tokens, ``L`` layers, ``D`` hidden size, ``R`` adapter rows per layer, ``A`` active rows of a layer,
``N`` experts, ``P`` probes, ``p`` prefetch depth, ``r`` LoRA rank, ``e`` bytes of an adapter element, ``q`` bytes of a
hidden-state element. A row is a key and a value, ``2D`` numbers.
"""

from __future__ import annotations

from meft.planner.activations import choose, largest, smallest
from meft.planner.architecture import ModelShape
from meft.planner.quantities import INDEX_BYTES, MASTER_BYTES, Flags, Ints
from meft.planner.terms_weights import LinearName, linear_sizes

INT64_BYTES = 8
CAST_ROWS = 256
"""Row gradients are cast to the sums' dtype so many rows at a time."""

# --- MEFT: on the device for good -----------------------------------------------------------------------------------


def row_staging_bytes(
    *, num_layers: int, hidden_size: int, active_rows_cap: Ints, prefetch_depth: Ints, retained: Flags, e: int
) -> Ints:
    """Buffers ``[cap, 2D]`` for rows: ``p + 1`` in a ring, or one per layer when rows are retained until backward."""
    buffers = choose(retained, num_layers, smallest(prefetch_depth + 1, num_layers))
    return buffers * active_rows_cap * 2 * hidden_size * e


def row_gradients_bytes(
    *, num_layers: int, hidden_size: int, active_rows_cap: Ints, prefetch_depth: Ints, e: int
) -> Ints:
    """One buffer ``[cap, 2D]`` for row gradients, and a second to fill while the first leaves when ``p > 0``."""
    buffers = 1 + smallest(prefetch_depth, num_layers - 1, 1)
    return buffers * active_rows_cap * 2 * hidden_size * e


def kept_rows_bytes(*, num_layers: int, hidden_size: int, cached_rows: Ints, e: int) -> Ints:
    """Rows that stay on the device through an accumulation window, ``[C, 2D]`` per layer."""
    return num_layers * cached_rows * 2 * hidden_size * e


def gradient_sums_bytes(
    *, num_layers: int, hidden_size: int, cached_rows: Ints, gradients_on_device: Flags, e: int
) -> Ints:
    """Their gradients' fp32 sums, and where those are wider than the gradients a buffer to cast some rows at a time."""
    cast = CAST_ROWS if e != MASTER_BYTES else 0
    return choose(gradients_on_device, (num_layers * cached_rows + cast) * 2 * hidden_size * MASTER_BYTES, 0)


def row_indices_bytes(*, num_layers: int, active_rows_cap: Ints, cached_rows: Ints, key_experts: Flags) -> Ints:
    """Per layer int32 ``[cap]``: the expert of each active row (Key-Experts), and the place of each cached one."""
    one = num_layers * active_rows_cap * INDEX_BYTES
    return choose(key_experts, one, 0) + choose(cached_rows > 0, one, 0)


def router_weights_bytes(*, num_layers: int, hidden_size: int, num_experts: Ints, key_experts: Flags) -> Ints:
    """The Key-Experts routers, fp32 ``[N, D]`` per layer; their gradients, and each of their moments, take the same."""
    return choose(key_experts, num_layers * num_experts * hidden_size * MASTER_BYTES, 0)


# --- MEFT: kept for backward ----------------------------------------------------------------------------------------


def probes_bytes(*, tokens: Ints, num_probes: Ints, key_experts: Flags) -> Ints:
    """Key-Experts: the experts that each token of one layer probes, int32 ``[T, P]``."""
    return choose(key_experts, tokens * num_probes * INDEX_BYTES, 0)


def adapter_inputs_bytes(*, tokens: Ints, hidden_size: int, e: int) -> Ints:
    """One layer's FFN input ``[T, D]`` in the adapter's dtype; below the adapter the FFN keeps none of its own."""
    return tokens * hidden_size * e


def adapter_activations_bytes(*, tokens: Ints, active_rows: Ints, e: int) -> Ints:
    """``ReLU(h K^T)``, ``[T, A]``."""
    return tokens * active_rows * e


def gates_bytes(*, tokens: Ints, num_experts: Ints, key_experts: Flags, e: int) -> Ints:
    """Key-Experts: one layer's gate scores ``[T, N]``."""
    return choose(key_experts, tokens * num_experts * e, 0)


# --- MEFT: for a while ----------------------------------------------------------------------------------------------


def adapter_forward_bytes(
    *, tokens: Ints, hidden_size: int, active_rows: Ints, key_experts: Flags, e: int, q: int
) -> Ints:
    """The output ``[T, D]`` (and its cast), and with Key-Experts the gates per row and the gated activations."""
    output = tokens * hidden_size * (e + (q if q != e else 0))
    return output + choose(key_experts, 2 * tokens * active_rows * e, 0)


def adapter_backward_bytes(
    *,
    tokens: Ints,
    hidden_size: int,
    active_rows: Ints,
    num_experts: Ints,
    num_probes: Ints,
    key_experts: Flags,
    e: int,
    q: int,
) -> Ints:
    """What one layer's adapter adds in backward.

    Exact routing: gradients ``[T, A]`` of activations and products, then the input's gradient ``[T, D]``. Key-Experts:
    the gate per row too, and the larger of what the gate's gradient needs (the membership matrix ``[A, N]``, a
    product, a mask and a gradient ``[T, N]``, int64 indices) and the input's gradient beside the gate's. In a dtype
    of its own the adapter also casts the gradient that comes in, and the one that goes out.
    """
    casts = tokens * hidden_size * (e + q) if e != q else 0
    exact = 2 * tokens * active_rows * e + tokens * hidden_size * e
    indices = INT64_BYTES * (active_rows + tokens * num_probes)
    of_gate = active_rows * num_experts * e + 2 * tokens * num_experts * e + indices
    of_input = tokens * num_experts * e + tokens * hidden_size * e
    gated = 3 * tokens * active_rows * e + largest(of_gate, of_input)
    return casts + choose(key_experts, gated, exact)


# --- dense baselines ------------------------------------------------------------------------------------------------


def parallel_adapter_parameters(*, num_layers: int, hidden_size: int, adapter_width: Ints) -> Ints:
    """Keys and values of every row."""
    return num_layers * 2 * adapter_width * hidden_size


def parallel_adapter_saved_bytes(*, tokens: Ints, hidden_size: int, adapter_width: Ints, e: int) -> Ints:
    """One layer's dense adapter: its input ``[T, D]`` and its activations ``[T, R]``."""
    return tokens * (hidden_size + adapter_width) * e


def parallel_adapter_backward_bytes(
    *, tokens: Ints, hidden_size: int, adapter_width: Ints, e: int, q: int, summed: bool
) -> Ints:
    """What one layer's dense adapter adds in backward to its two gradients: the worst of its moments.

    At the values: the gradient ``[T, R]`` of their input, and of the output if it had to be cast; at the ReLU: two
    ``[T, R]``; at the keys: one and the input's ``[T, D]``; at last that and its cast. Before the keys their gradient
    is still to be made; gradients that are ``summed`` over micro-batches are made apart, one at a time.
    """
    activations: Ints = tokens * adapter_width * e
    hidden: Ints = tokens * hidden_size
    casts = int(e != q)
    matrix: Ints = adapter_width * hidden_size * e
    apart: Ints = matrix if summed else 0
    to_be_made: Ints = 0 if summed else matrix
    return largest(
        casts * hidden * e + activations + apart - to_be_made,
        2 * activations - to_be_made,
        activations + hidden * e + apart,
        hidden * (e + casts * q),
    )


def lora_parameters(shape: ModelShape, *, rank: Ints, targets: tuple[LinearName, ...]) -> Ints:
    """``r * (inputs + outputs)`` of every targeted linear layer."""
    sizes = linear_sizes(shape)
    return shape.num_layers * rank * sum(sum(sizes[target]) for target in targets)


def lora_saved_bytes(
    shape: ModelShape, *, tokens: Ints, rank: Ints, targets: tuple[LinearName, ...], eager: bool, e: int, q: int
) -> Ints:
    """One layer's LoRA: ``[T, r]`` per target, and the target's input.

    In the dtype of the hidden states targets share an input, and fused attention keeps the output projection's
    already; in a dtype of its own each target casts its input for itself.
    """
    ranks = len(targets) * tokens * rank * e
    sizes = linear_sizes(shape)
    if e != q:
        return ranks + tokens * e * sum(sizes[target][0] for target in targets)
    shared = {_input_of(target): sizes[target][0] for target in targets}
    if not eager:
        shared.pop("attention_output", None)
    return ranks + tokens * q * sum(shared.values())


def lora_freed_bytes(shape: ModelShape, *, tokens: Ints, rank: Ints, targets: tuple[LinearName, ...], e: int) -> Ints:
    """What one layer's LoRA has given back when the FFN's product is taken apart: the down projection's share."""
    return tokens * (shape.intermediate_size + rank) * e if "down" in targets else 0


def lora_backward_bytes(
    shape: ModelShape, *, tokens: Ints, rank: Ints, targets: tuple[LinearName, ...], e: int, q: int
) -> Ints:
    """The widest target's gradients: of its output cast and scaled, when LoRA has a dtype of its own, or later of its
    input by both ways; and of ``[T, r]``."""
    sizes = linear_sizes(shape)
    cast = 2 * e if e != q else 0
    widest = max(max(sizes[target][1] * cast, sizes[target][0] * (e + q)) for target in targets)
    return tokens * (widest + rank * e)


def full_saved_bytes(shape: ModelShape, *, tokens: Ints, eager: bool, q: int) -> Ints:
    """What trained weights add to what a frozen layer keeps: every linear layer's input and every norm's product.

    The FFN's inner product ``[T, I]``, both normalised inputs ``[T, D]``, what RMSNorm multiplies its weight with,
    and in eager attention its output.
    """
    inner = shape.intermediate_size
    normalised = (1 if shape.parallel_blocks else 2) * shape.hidden_size
    multiplied = shape.norms_per_layer * shape.hidden_size if shape.norm == "rmsnorm" else 0
    attention = shape.query_size if eager else 0
    return tokens * q * (inner + normalised + multiplied + attention)


def optimizer_temporary_bytes(*, num_parameters: Ints, element_bytes: int) -> Ints:
    """AdamW's multi-tensor step holds one temporary as large as all trained parameters."""
    return num_parameters * element_bytes


def _input_of(target: LinearName) -> str:
    if target in ("q", "k", "v"):
        return "attention_input"
    if target in ("gate", "up"):
        return "ffn_input"
    return "attention_output" if target == "o" else "ffn_product"
