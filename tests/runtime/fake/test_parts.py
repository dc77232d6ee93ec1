"""The parts of a trace by hand: 4-bit layers, losses, optimizers, autocast, and temporaries inside operators."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")

from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from meft.runtime.fake.autocast import autocast_dtype, cuda_lists  # noqa: E402
from meft.runtime.fake.books import CudaBooks  # noqa: E402
from meft.runtime.fake.functions import cuda_functions  # noqa: E402
from meft.runtime.fake.linear4bit import Linear4bit, QuantizedWeight  # noqa: E402
from meft.runtime.trace.losses import FusedCrossEntropy, FusedLinearCrossEntropy, chunk_tokens  # noqa: E402
from meft.runtime.trace.optimizers import make_optimizer, state_tensors  # noqa: E402

BF16 = torch.bfloat16


def recorded(work: Callable[[], object], *adopted: torch.Tensor) -> tuple[list[int], object]:
    """Bytes that come and go while ``work`` runs inside the books, and what it returns."""
    books = CudaBooks(workspace_bytes=0, categorise=lambda: "any")
    for tensor in adopted:
        books.adopt(tensor)
    begin = len(books.log.stream().events)
    with books:
        result = work()
    return [event.num_bytes for event in books.log.stream().events[begin:]], result


# --- 4 bits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("double_quant", [False, True])
def test_a_quantized_weight_by_hand(double_quant) -> None:
    """256 x 96 = 24,576 weights: packed 12,288; 384 maxima; a table of 16. Double quantization: the maxima in a byte
    each, 2 maxima of theirs, a table of 256, an offset."""
    _, weight = recorded(lambda: QuantizedWeight(torch.Size((256, 96)), BF16, double_quant=double_quant))
    sizes = [tensor.untyped_storage().nbytes() for tensor in weight.tensors()]
    assert sizes == ([12288, 384, 64, 8, 1024, 4] if double_quant else [12288, 1536, 64])


def test_a_4_bit_product_writes_the_weight_out_and_drops_it_in_both_directions() -> None:
    layer = Linear4bit(torch.Size((256, 96)), None, dtype=BF16, double_quant=False)
    inputs = torch.zeros(8, 96, dtype=BF16, requires_grad=True)
    weight, output = 2 * 256 * 96, 2 * 8 * 256
    forward, result = recorded(lambda: layer(inputs), inputs, *layer.quantized.tensors())
    assert forward == [weight, output, -weight]
    gradient = torch.zeros_like(result)
    backward, _ = recorded(
        lambda: torch.autograd.backward(result, gradient), inputs, result, gradient, *layer.quantized.tensors()
    )
    assert backward == [weight, 2 * 8 * 96, -weight]


def test_the_input_is_cast_to_16_bits_and_the_output_back() -> None:
    bias = torch.nn.Parameter(torch.zeros(256), requires_grad=False)
    layer = Linear4bit(torch.Size((256, 96)), bias, dtype=BF16, double_quant=False)
    output = layer(torch.zeros(8, 96, requires_grad=True))
    assert output.dtype == torch.float32
    assert layer.bias.dtype == BF16  # for good, as in bitsandbytes


# --- losses ----------------------------------------------------------------------------------------------------------


def test_the_fused_loss_writes_its_gradient_over_the_logits() -> None:
    logits = torch.zeros(8, 1024, dtype=BF16, requires_grad=True)
    targets = torch.zeros(8, dtype=torch.int64)
    events, loss = recorded(lambda: FusedCrossEntropy.apply(logits, targets), logits, targets)
    assert max(events) < logits.numel()
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient.untyped_storage()._cdata == logits.untyped_storage()._cdata


@pytest.mark.parametrize(("tokens", "hidden", "vocab", "chunk"), [(4096, 4096, 32000, 512), (64, 896, 151936, 1)])
def test_chunks_of_the_fused_head_and_loss(tokens, hidden, vocab, chunk) -> None:
    """32000 / 4096 rounds up to 8: 512 tokens. 151936 / 896 rounds up to 170: one token."""
    assert chunk_tokens(tokens, hidden, vocab) == chunk


@pytest.mark.parametrize("trained", [False, True])
def test_the_fused_head_never_holds_all_logits(trained) -> None:
    """16 tokens of 64 numbers, 480 words: 8 times as many, so chunks of 2 tokens."""
    hidden = torch.zeros(16, 64, dtype=BF16, requires_grad=True)
    weight = torch.zeros(480, 64, dtype=BF16, requires_grad=trained)
    targets = torch.zeros(16, dtype=torch.int64)
    fused = FusedLinearCrossEntropy.apply
    events, loss = recorded(lambda: fused(hidden, weight, targets, None), hidden, weight, targets)
    chunk = 2 * 2 * 480
    assert Counter(events)[chunk] == 8
    assert 2 * 16 * 480 not in events
    assert (4 * 480 * 64 in events) == trained  # the head's gradient of a chunk, in fp32 before it is added
    torch.autograd.backward(loss)
    assert (weight.grad is not None) == trained


# --- optimizers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "states", "largest_temporary"),
    [
        ("adamw", [400_000, 400_000, 4000, 4000], 400_000),  # two moments; the root of the second
        ("adamw-fused", [400_000, 400_000, 4000, 4000, 4, 4], 0),  # and the counts of steps
        # a byte an element and 4 per 256 for the large one, fp32 for the small one, and two tables of 256
        ("adamw-8bit", [100_000, 100_000, 1564, 1564, 4000, 4000, 1024, 1024], 0),
        ("paged-adamw-8bit", [1564, 1564, 4000, 4000, 1024, 1024], 0),  # those of 100,000 elements are paged
        ("sgd", [], 0),
    ],
)
def test_what_an_optimizer_keeps_and_needs(name, states, largest_temporary) -> None:
    """Parameters of 100,000 and 1,000 elements, fp32; the second step, when the states are there."""
    parameters = [torch.nn.Parameter(torch.zeros(size)) for size in (100_000, 1000)]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer = make_optimizer(name, parameters)
    optimizer.step()
    on_device = [each.untyped_storage().nbytes() for each in state_tensors(optimizer)]
    if name == "adamw":
        on_device = [size for size in on_device if size > 4]  # the counts of steps are on the host
    assert Counter(on_device) == Counter(states)
    known = (*parameters, *(parameter.grad for parameter in parameters), *state_tensors(optimizer))
    events, _ = recorded(optimizer.step, *known)
    assert max((size for size in events if size > 8), default=0) == largest_temporary


# --- autocast --------------------------------------------------------------------------------------------------------


def test_inside_autocast_follows_cudas_lists_and_outside_nothing_is_left() -> None:
    x = torch.ones(4, 8, dtype=BF16)
    norm = torch.nn.LayerNorm(8, dtype=BF16)
    in_fp32 = (lambda: x.pow(3), lambda: norm(x), lambda: x.sum(), lambda: torch.rsqrt(x), lambda: torch.softmax(x, -1))
    with cuda_lists(), torch.autocast("cpu", dtype=BF16):
        assert [work().dtype for work in in_fp32] == [torch.float32] * 5
        assert F.linear(torch.ones(2, 8), torch.ones(8, 8)).dtype == BF16
        assert torch.softmax(x, -1, dtype=BF16).dtype == BF16  # whoever says a dtype gets it
        assert torch.ones(3, dtype=torch.int64).cumsum(0).dtype == torch.int64
        assert torch.is_autocast_enabled()
        assert autocast_dtype() == BF16
    with torch.autocast("cpu", dtype=BF16):
        assert [work().dtype for work in in_fp32] == [BF16] * 5
    assert autocast_dtype() is None


def test_a_16_bit_copy_of_a_trained_weight_lives_until_autocast_ends() -> None:
    weight = torch.nn.Parameter(torch.zeros(16, 16))
    frozen = torch.zeros(16, 16)
    inputs = torch.zeros(4, 16, dtype=BF16)

    def work() -> None:
        with torch.autocast("cpu", dtype=BF16), torch.no_grad():
            for _ in range(3):
                F.linear(inputs, weight)
                F.linear(inputs, frozen)

    events, _ = recorded(work, weight, frozen, inputs)
    copies = [size for size in events if abs(size) == 2 * 16 * 16]
    assert sum(size > 0 for size in copies) == 1 + 3  # one for the trained weight, one per use of the frozen one
    assert events[-1] == -2 * 16 * 16


# --- functions and operators -----------------------------------------------------------------------------------------


def test_dropout_keeps_a_mask_of_one_byte_an_element() -> None:
    x = torch.zeros(64, 64, dtype=BF16, requires_grad=True)
    with cuda_functions():
        events, _ = recorded(lambda: F.dropout(x, 0.1), x)
        nothing, same = recorded(lambda: F.dropout(x, 0.0), x)
    assert events[:2] == [2 * 4096, 4096]
    assert (nothing, same is x) == ([], True)


def test_fp16_goes_into_an_fp32_softmax_without_a_copy() -> None:
    for dtype, expected in ((torch.float16, [4 * 4096]), (BF16, [4 * 4096, 4 * 4096])):
        with FakeTensorMode(), cuda_functions():  # the CPU itself cannot
            x = torch.zeros(64, 64, dtype=dtype)
            events, _ = recorded(lambda x=x: F.softmax(x, dim=-1, dtype=torch.float32), x)
        assert [size for size in events if size > 0] == expected


@pytest.mark.parametrize("tokens", [3072, 3073])
def test_the_embeddings_gradient_sorts_many_tokens(tokens) -> None:
    """3,073 tokens of 500 words: 307 + 500 segments of 16 numbers in fp32, and indices of 8 bytes."""
    weight = torch.zeros(500, 16, dtype=BF16, requires_grad=True)
    ids = torch.zeros(tokens, dtype=torch.int64)
    gradient = torch.zeros(tokens, 16, dtype=BF16)
    output = F.embedding(ids, weight)
    events, _ = recorded(lambda: torch.autograd.backward(output, gradient), weight, ids, gradient, output)
    expected = [8 * count for count in (3073, 3073, 3073, 500, 500, 807)] + [4 * 807 * 16] if tokens > 3072 else []
    assert [size for size in events if size > 0] == [2 * 500 * 16, *expected]
    assert Counter(size for size in events if size < 0) == Counter(-size for size in expected)


def test_statistics_of_layernorm_are_fp32() -> None:
    x, weight = torch.zeros(8, 64, dtype=BF16), torch.ones(64, dtype=BF16)
    events, _ = recorded(lambda: torch.native_layer_norm(x, [64], weight, weight, 1e-5), x, weight)
    assert [size for size in events if size > 0] == [2 * 8 * 64, 4 * 8, 4 * 8]


def test_each_thread_that_multiplies_takes_a_workspace_once() -> None:
    books = CudaBooks(workspace_bytes=8_519_680, categorise=lambda: "any")
    weight = torch.nn.Parameter(torch.zeros(4, 4))
    books.adopt(weight)
    with books:
        for _ in range(2):
            x = torch.zeros(2, 4)
            F.linear(F.linear(x, weight), weight).sum().backward()
    taken = [event for event in books.log.stream().events if event.category == "cublas_workspaces"]
    assert [event.num_bytes for event in taken] == [8_519_680] * 2
    stream = books.log.stream().events
    assert stream.index(taken[0]) < len(stream) / 2  # forward's with the first product, autograd's with its first
