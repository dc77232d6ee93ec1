"""Device bytes of the sparse adapter of MEFT, term by term.

Every term is a short pure function of ints or numpy int64 arrays alike.

Letters: ``T`` tokens, ``L`` layers, ``D`` hidden size, ``R`` adapter rows per layer, ``A`` active rows of a layer,
``N`` experts, ``P`` probes, ``p`` prefetch depth, ``e`` bytes of an adapter element, ``q`` bytes of a
hidden-state element. A row is a key and a value, ``2D`` numbers.
"""

from __future__ import annotations

from meft.planner.base.quantities import INDEX_BYTES, MASTER_BYTES, Flags, Ints
from meft.planner.terms.activations import choose, largest, smallest

INT64_BYTES = 8
CAST_ROWS = 256
"""Row gradients are cast to the sums' dtype so many rows at a time."""

# --- MEFT: on the device for good -----------------------------------------------------------------------------------


def row_staging_bytes(
    *,
    num_layers: int,
    hidden_size: int,
    active_rows_cap: Ints,
    prefetch_depth: Ints,
    retained: Flags,
    e: int,
    token_chunks: int = 1,
) -> Ints:
    """Buffers ``[cap, 2D]`` for rows: ``p + 1`` in a ring, or one per layer when rows are retained until backward;
    with token chunks ``max(p, 1) + 1``."""
    if token_chunks > 1:
        buffers: Ints = largest(smallest(prefetch_depth, num_layers - 1), 1) + 1
    else:
        buffers = choose(retained, num_layers, smallest(prefetch_depth + 1, num_layers))
    return buffers * (active_rows_cap * (2 * hidden_size * e))


def row_gradients_bytes(
    *, num_layers: int, hidden_size: int, active_rows_cap: Ints, prefetch_depth: Ints, e: int
) -> Ints:
    """One buffer ``[cap, 2D]`` for row gradients, and a second to fill while the first leaves when ``p > 0``."""
    buffers = 1 + smallest(prefetch_depth, num_layers - 1, 1)
    return buffers * (active_rows_cap * (2 * hidden_size * e))


def kept_rows_bytes(*, num_layers: int, hidden_size: int, cached_rows: Ints, e: int) -> Ints:
    """Rows that stay on the device through an accumulation window, ``[C, 2D]`` per layer."""
    return cached_rows * (num_layers * 2 * hidden_size * e)


def gradient_sums_bytes(
    *, num_layers: int, hidden_size: int, cached_rows: Ints, gradients_on_device: Flags, e: int, hot_rows: Ints = 0
) -> Ints:
    """Their gradients' fp32 sums, and where those are wider than the gradients a buffer to cast some rows at a time,
    which the hot rows' gradients go through too."""
    row = 2 * hidden_size * MASTER_BYTES
    cast = CAST_ROWS * row if e != MASTER_BYTES else 0
    return choose(gradients_on_device, cached_rows * (num_layers * row) + cast, choose(hot_rows > 0, cast, 0))


def row_indices_bytes(
    *,
    num_layers: int,
    active_rows_cap: Ints,
    cached_rows: Ints,
    key_experts: Flags,
    hot_rows: Ints = 0,
    token_chunks: int = 1,
) -> Ints:
    """Per layer, and chunk of tokens, int32 ``[cap]``: the expert of each active row (Key-Experts), and the place of
    each that is there."""
    one = active_rows_cap * (num_layers * token_chunks * INDEX_BYTES)
    kinds = key_experts * 1 + ((cached_rows + hot_rows > 0) | (token_chunks > 1))
    return one * kinds


def router_weights_bytes(*, num_layers: int, hidden_size: int, num_experts: Ints, key_experts: Flags) -> Ints:
    """The Key-Experts routers, fp32 ``[N, D]`` per layer; their gradients, and each of their moments, take the same."""
    return choose(key_experts, num_experts * (num_layers * hidden_size * MASTER_BYTES), 0)


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


def gates_bytes(*, tokens: Ints, num_experts: Ints, key_experts: Flags, e: int, switch: Flags = False) -> Ints:
    """Key-Experts: one layer's gate scores ``[T, N]``; switch: its probabilities, in the router's fp32; stable: the
    scores of both routers, which ``N`` counts."""
    return choose(key_experts, tokens * num_experts * choose(switch, MASTER_BYTES, e), 0)


# --- MEFT: for a while ----------------------------------------------------------------------------------------------


def adapter_forward_bytes(
    *,
    tokens: Ints,
    hidden_size: int,
    active_rows: Ints,
    key_experts: Flags,
    e: int,
    q: int,
    top_k: Ints = 0,
    own_rows: Flags = False,
    num_experts: Ints = 1,
    switch: Flags = False,
) -> Ints:
    """The output ``[T, D]`` (and its cast), and with Key-Experts the gates per row and the gated activations; or, where
    that is more, what it takes to leave each token its own rows (with Key-Experts beside the gates per row), or what a
    switch router reads, fp32 ``[T, D]``, with its scores and probabilities (or a stable one, with both routers')."""
    output = tokens * hidden_size * (e + (q if q != e else 0))
    usual = output + choose(key_experts, 2 * tokens * active_rows * e, 0)
    if switch is not False:
        read = choose(switch, tokens * (hidden_size + 2 * num_experts) * MASTER_BYTES, 0)
        usual = largest(usual, read)
    if own_rows is False:
        return usual
    own = own_rows_bytes(tokens=tokens, active_rows=active_rows, top_k=top_k, e=e)
    return largest(usual, choose(own_rows, own + choose(key_experts, tokens * active_rows * e, 0), 0))


def own_rows_bytes(*, tokens: Ints, active_rows: Ints, top_k: Ints, e: int) -> Ints:
    """Each token's best ``K`` products and where they are, int64 ``[T, K]``, and a bool ``[T, A]`` of the others."""
    return tokens * (active_rows + top_k * (e + INT64_BYTES))


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
    switch: Flags = False,
    routers: int = 1,
) -> Ints:
    """What one layer's adapter adds in backward.

    Exact routing: gradients ``[T, A]`` of activations and products, then the input's gradient ``[T, D]``. Key-Experts:
    the gate per row too, and the larger of what the gate's gradient needs (the membership matrix ``[A, N]``, a
    product, a mask and a gradient ``[T, N]``, int64 indices) and the input's gradient beside the gate's. In a dtype
    of its own the adapter also casts the gradient that comes in, and the one that goes out. A switch router's scores
    have fp32 gradients, and what goes to the input through it is fp32 ``[T, D]``, beside as many random numbers; those
    of a stable one are ``[T, 2N]``, beside the light router's, and there are no random numbers.
    """
    casts = tokens * hidden_size * (e + q) if e != q else 0
    exact = 2 * tokens * active_rows * e + tokens * hidden_size * e
    indices = INT64_BYTES * (active_rows + tokens * num_probes)
    of_gate = active_rows * num_experts * e + 2 * tokens * num_experts * e + indices
    of_input = tokens * num_experts * e + tokens * hidden_size * e
    if switch is not False:
        light = 2 * (routers - 1) * MASTER_BYTES
        of_scores = e + routers * MASTER_BYTES + light
        in_fp32 = active_rows * num_experts * e + tokens * num_experts * of_scores + indices
        of_gate = choose(switch, in_fp32, of_gate)
        wide = MASTER_BYTES * (2 if routers == 1 else 1)
        in_fp32 = routers * tokens * num_experts * MASTER_BYTES + tokens * hidden_size * (e + wide)
        of_input = choose(switch, in_fp32, of_input)
    gated = 3 * tokens * active_rows * e + largest(of_gate, of_input)
    return casts + choose(key_experts, gated, exact)


# --- MEFT in chunks of tokens ---------------------------------------------------------------------------------------


def chunk_forward_bytes(
    *,
    tokens: Ints,
    chunk_tokens: int,
    hidden_size: int,
    active_rows: Ints,
    num_experts: Ints,
    key_experts: Flags,
    e: int,
    q: int,
    top_k: Ints = 0,
    own_rows: Flags = False,
) -> Ints:
    """The output ``[T, D]`` of all tokens; and of one chunk its activations ``[T/C, A]``, gates and gates per row, and
    where the adapter has a dtype of its own its input and output. Or, where that is more, what it takes to leave each
    token its own rows."""
    cast: Ints = chunk_tokens * hidden_size * e if e != q else 0
    of_rows: Ints = chunk_tokens * active_rows * e
    activations: Ints = of_rows + choose(key_experts, of_rows + chunk_tokens * num_experts * e, 0)
    own = choose(own_rows, own_rows_bytes(tokens=chunk_tokens, active_rows=active_rows, top_k=top_k, e=e), 0)
    total: Ints = tokens * hidden_size * q + cast + activations + largest(cast, own)
    return total


def chunk_backward_bytes(
    *,
    tokens: Ints,
    chunk_tokens: int,
    hidden_size: int,
    active_rows: Ints,
    num_experts: Ints,
    num_probes: Ints,
    key_experts: Flags,
    e: int,
    q: int,
) -> Ints:
    """The input's gradient ``[T, D]`` of all tokens, and with Key-Experts the router's, fp32; and of one chunk what its
    adapter computes again, activations ``[T/C, A]`` and gates, with what a whole adapter adds in backward."""
    whole = adapter_backward_bytes(
        tokens=chunk_tokens,
        hidden_size=hidden_size,
        active_rows=active_rows,
        num_experts=num_experts,
        num_probes=num_probes,
        key_experts=key_experts,
        e=e,
        q=e,
    )
    of_input: Ints = chunk_tokens * hidden_size * e
    again: Ints = chunk_tokens * active_rows * e + choose(key_experts, chunk_tokens * num_experts * e, 0)
    casts = 2 * of_input if e != q else -of_input  # input and gradient; or the input's gradient, written in its place
    router = choose(key_experts, num_experts * hidden_size * MASTER_BYTES, 0)
    total: Ints = tokens * hidden_size * q + router + again + whole + casts
    return total
