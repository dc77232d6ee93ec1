"""Attention's kernels: which one CUDA takes, what it keeps, and what its backward needs for a while."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from meft.runtime.fake.attention import FlashAttention, choose_kernel, scaled_dot_product_attention  # noqa: E402
from meft.runtime.fake.books import CudaBooks  # noqa: E402

B, S, H, G, D = 2, 40, 4, 2, 16
"""Batch, length (no multiple of 32, 64 or 128), heads, key-value heads, head size."""
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


def heads(number: int, *, dtype: torch.dtype, size: int = D) -> torch.Tensor:
    """``[B, number, S, size]``, laid out ``[B, S, number, size]`` as a projection gives it."""
    return torch.zeros(B, S, number, size, dtype=dtype, requires_grad=True).transpose(1, 2)


def events_of(books: CudaBooks) -> list[int]:
    return [event.num_bytes for event in books.log.stream().events]


def run(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: object) -> tuple[list[int], list[int]]:
    """Bytes of the storages that forward and backward make, those that stay and those that go."""
    books = CudaBooks(workspace_bytes=0, categorise=lambda: "any")
    for tensor in (query, key, value, *(each for each in options.values() if isinstance(each, torch.Tensor))):
        books.adopt(tensor)
    begin = len(books.log.stream().events)
    with books:
        output = scaled_dot_product_attention(query, key, value, **options)
        forward = events_of(books)[begin:]
        gradient = torch.zeros_like(output)
        begin = len(books.log.stream().events)
        torch.autograd.backward(output, gradient)
    return forward, events_of(books)[begin:]


@pytest.mark.parametrize(
    ("dtype", "mask", "size", "key_heads", "enable_gqa", "kernel"),
    [
        (BF16, False, 64, H, False, "flash"),
        (FP16, False, 256, H, False, "flash"),
        (BF16, False, 64, G, True, "flash"),  # grouped heads are the flash kernel's own
        (BF16, True, 64, H, False, "efficient"),  # a mask is not
        (FP32, False, 64, H, False, "efficient"),
        (FP32, True, 64, H, False, "efficient"),
        (BF16, False, 264, H, False, "efficient"),  # heads above 256
        (FP32, False, 64, G, True, "math"),  # the memory-efficient kernel wants as many key heads
        (BF16, True, 64, G, True, "math"),
        (BF16, True, 60, H, False, "math"),  # rows of 120 bytes do not start on 16
    ],
)
def test_cudas_choice_of_kernel(dtype, mask, size, key_heads, enable_gqa, kernel) -> None:
    query, key = heads(H, dtype=dtype, size=size), heads(key_heads, dtype=dtype, size=size)
    tensor = torch.zeros(B, 1, S, S, dtype=torch.bool) if mask else None
    assert choose_kernel(query, key, key, tensor, enable_gqa=enable_gqa) == kernel


def test_flash_keeps_output_and_log_sum_exp() -> None:
    """bf16, as many key heads: output 2*B*S*H*D, log-sum-exp 4*B*H*S, two numbers of random state."""
    forward, backward = run(*(heads(H, dtype=BF16) for _ in range(3)))
    output = 2 * B * S * H * D
    assert forward == [output, 4 * B * H * S, 16]
    # three gradients; row sums for 128 rows and the query's gradient in fp32 with heads rounded up to 32, which go
    sums, accumulated = 4 * B * H * 128, 4 * B * 128 * H * 32
    made = [size for size in backward if size > 0]
    assert made == [output] * 3 + [sums, accumulated]
    assert sorted(size for size in backward if size < 0 and -size in (sums, accumulated)) == [-accumulated, -sums]


def test_grouped_heads_get_gradients_for_every_query_head_first() -> None:
    _, backward = run(heads(H, dtype=BF16), heads(G, dtype=BF16), heads(G, dtype=BF16), is_causal=True, enable_gqa=True)
    made = [size for size in backward if size > 0]
    grouped, every = 2 * B * S * G * D, 2 * B * S * H * D
    assert made[:3] == [every, grouped, grouped]
    assert made[-2:] == [every, every]


def test_flash_over_sequences_of_varying_length_adds_rows_for_each() -> None:
    """``[T, H, D]``: 128 rows more for each of B sequences instead of a rounded length."""
    books = CudaBooks(workspace_bytes=0, categorise=lambda: "any")
    tokens = torch.zeros(B * S, H, D, dtype=BF16, requires_grad=True)
    books.adopt(tokens)
    with books:
        output = FlashAttention.apply(tokens * 1, tokens, tokens, B)
        torch.autograd.backward(output, torch.zeros_like(output))
    made = {event.num_bytes for event in books.log.stream().events}
    assert 4 * H * (B * S + 128 * B) in made
    assert 4 * (B * S + 128 * B) * H * 32 in made


def test_the_memory_efficient_kernel_turns_the_mask_into_numbers_at_every_call() -> None:
    mask = torch.zeros(B, 1, S, S, dtype=torch.bool)
    forward, backward = run(*(heads(H, dtype=BF16) for _ in range(3)), attn_mask=mask)
    cells = B * S * S
    # masked out or not, the mask in bf16, which stays; output and log-sum-exp of 64 rows; and numbers without dimension
    assert [size for size in forward if size > 2] == [cells, 2 * cells, 2 * B * S * H * D, 4 * B * H * 64]
    assert [size for size in forward if size < -2] == [-cells]
    block = 16 + 4 * 64 * 64
    assert [size for size in backward if size > 0][-2:] == [4 * B * H * S, B * H * block]


def test_a_mask_whose_rows_are_not_aligned_is_padded() -> None:
    mask = torch.zeros(B, 1, S, S - 1, dtype=torch.bool)
    key = torch.zeros(B, S - 1, H, D, dtype=BF16, requires_grad=True).transpose(1, 2)
    forward, _ = run(heads(H, dtype=BF16), key, key, attn_mask=mask)
    assert 2 * B * S * 40 in forward  # 39 columns become 40


def test_fp32_rows_are_summed_from_a_product() -> None:
    """For fp32 the kernel does not make the row sums itself: grad * output, its sum, and the sum laid out anew."""
    _, backward = run(*(heads(H, dtype=FP32) for _ in range(3)))
    product, rows = 4 * B * S * H * D, 4 * B * H * S
    assert [size for size in backward if size > 0][:6] == [product] * 3 + [product, rows, rows]


def test_the_plain_formula_writes_the_scores_out() -> None:
    """fp32 with grouped heads: query and key scaled, keys and values repeated, scores and probabilities."""
    forward, _ = run(heads(H, dtype=FP32), heads(G, dtype=FP32), heads(G, dtype=FP32), is_causal=True, enable_gqa=True)
    scores = 4 * B * H * S * S
    assert forward.count(scores) == 2  # scores and probabilities, which the safe softmax writes its zeros over
    assert forward.count(-scores) == 1
    assert forward.count(B * H * S * S) == 1  # which scores are -inf
    assert forward.count(4 * B * S * H * D) >= 5  # scaled query, repeated keys and values, scaled keys, output


def test_half_precision_is_computed_in_fp32_by_the_plain_formula() -> None:
    options = {"attn_mask": torch.zeros(B, 1, S, S, dtype=torch.bool), "enable_gqa": True}
    forward, _ = run(heads(H, dtype=BF16), heads(G, dtype=BF16), heads(G, dtype=BF16), **options)
    assert 4 * B * H * S * S in forward
    assert 2 * B * H * S * S not in forward or forward.count(-2 * B * H * S * S)  # only the rounded copy, which goes


def test_autocast_runs_attention_in_16_bits() -> None:
    with torch.autocast("cpu", dtype=BF16):
        output = scaled_dot_product_attention(*(heads(H, dtype=FP32) for _ in range(3)))
    assert output.dtype == BF16


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_values_do_not_matter_but_shapes_do(dropout) -> None:
    output = scaled_dot_product_attention(*(heads(H, dtype=BF16) for _ in range(3)), dropout_p=dropout)
    assert output.shape == (B, H, S, D)
    assert output.transpose(1, 2).is_contiguous()  # transformers' transpose and contiguous() cost nothing
