"""The kernels of a frozen layer, counted again by dispatching a training step of small random models."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest
import torch
from planner_records import tiny_shape
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from meft.planner.timing.layer_kernels import LAYERS, Kernels, family_of, layer_kernels

BATCH, SEQ_LEN = 16, 8
HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INTERMEDIATE = 512, 8, 4, 64, 1408
PRODUCTS = ("mm", "bmm", "addmm", "baddbmm", "_scaled_dot_product")
NO_KERNEL = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "_unsafe_view", "detach")
WRITES_ONLY = ("fill_", "zero_", "zeros", "full", "zeros_like", "ones_like", "full_like")
PARTS = ("attention", "ffn", "backward")


def num_bytes(tensor: torch.Tensor) -> int:
    """What a kernel reads of it: a broadcast dimension is read once."""
    sizes = [size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride]
    return int(torch.tensor(sizes).prod()) * tensor.element_size()


class Counter(TorchDispatchMode):
    """Kernels, and bytes of those that are not products, by the part of the layer that is running."""

    def __init__(self) -> None:
        super().__init__()
        self.part = "outside"
        self.launches: dict[str, int] = defaultdict(int)
        self.elementwise_bytes: dict[str, int] = defaultdict(int)

    def enter(self, part: str) -> None:
        self.part = part

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result, name = func(*args, **(kwargs or {})), func._schema.name.partition("::")[2]
        if func.is_view or name in NO_KERNEL:
            return result
        self.launches[self.part] += 1
        if not name.startswith(PRODUCTS):
            inputs, outputs = tensors((args, kwargs)), tensors(result)
            if name in WRITES_ONLY:
                inputs = []
            elif name == "copy_":
                inputs = inputs[1:]
            self.elementwise_bytes[self.part] += sum(map(num_bytes, inputs)) + sum(map(num_bytes, outputs))
        return result


def tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def model_of(family: str, num_layers: int, score_kernel: str) -> Any:
    attention = {"attn_implementation": "eager" if score_kernel == "eager" else "sdpa"}
    if family == "llama":
        config = LlamaConfig(
            vocab_size=64, hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, num_hidden_layers=num_layers,
            num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, **attention,
        )  # fmt: skip
        return LlamaForCausalLM(config)
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    tokens = {"bos_token_id": None, "eos_token_id": None}
    sizes = {"n_embd": HIDDEN, "n_head": HEADS, "n_inner": INTERMEDIATE, "n_layer": num_layers}
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, **sizes, **dropout, **tokens, **attention))


def counted(family: str, num_layers: int, score_kernel: str, dtype: torch.dtype) -> Counter:
    """One step of training, gradients flowing to the embeddings."""
    model, counter = model_of(family, num_layers, score_kernel).to(dtype).requires_grad_(False), Counter()
    layers = model.model.layers if family == "llama" else model.transformer.h
    for layer in layers:
        layer.register_forward_pre_hook(lambda *_: counter.enter("attention"))
        layer.mlp.register_forward_pre_hook(lambda *_: counter.enter("ffn"))
    layers[-1].register_forward_hook(lambda *_: counter.enter("outside"))
    states = torch.randn(BATCH, SEQ_LEN, HIDDEN, dtype=dtype, requires_grad=True)
    with counter:
        total = model(inputs_embeds=states, use_cache=False).logits.sum()
        counter.enter("backward")
        total.backward()
    return counter


@pytest.mark.parametrize(("family", "element_bytes", "score_kernel"), LAYERS, ids=lambda value: str(value))
def test_the_kernels_of_a_layer_are_those_of_the_model(family: str, element_bytes: int, score_kernel: str):
    dtype = torch.float32 if element_bytes == 4 else torch.bfloat16
    fewer, more = (counted(family, num_layers, score_kernel, dtype) for num_layers in (2, 4))
    shape = tiny_shape(
        hidden_size=HIDDEN, num_heads=HEADS, num_kv_heads=KV_HEADS if family == "llama" else HEADS, head_dim=HEAD_DIM,
        intermediate_size=INTERMEDIATE, norm="rmsnorm" if family == "llama" else "layernorm",
    )  # fmt: skip
    assert family_of(shape) == family
    layer = layer_kernels(shape, element_bytes=element_bytes, attention="eager" if score_kernel == "eager" else "sdpa")
    for part in PARTS:
        kernels: Kernels = getattr(layer, part)
        assert kernels.launches == (more.launches[part] - fewer.launches[part]) / 2, part
        moved = (more.elementwise_bytes[part] - fewer.elementwise_bytes[part]) / 2
        tokens = BATCH * SEQ_LEN
        assert kernels.elementwise_bytes(shape, tokens=tokens, seq_len=SEQ_LEN) == pytest.approx(moved, rel=0.006), part


def test_more_tokens_and_longer_sequences_move_more():
    shape = tiny_shape(num_heads=2)
    kernels = Kernels(1, hidden=3, scores=5)
    assert kernels.elementwise_bytes(shape, tokens=10, seq_len=7) == 10 * (3 * shape.hidden_size + 5 * 2 * 7)
