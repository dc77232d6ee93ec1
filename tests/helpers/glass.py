"""A real, tiny LLaMA for tests: 852,608 parameters, trained on Lewis Carroll, from the package ``glassllm`` (MIT).

4 layers, D = 128, feed-forward 341, 4 heads and 2 key-value heads of 32, 1,024 tokens, tied embeddings, positions up to
128. The package's arrays are read directly: matrices are stored [in, out] in float16, and rotary pairs are neighbours
(2i, 2i+1) where transformers wants halves (i, i+16), so the rows of q and k are reordered.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

NUM_PARAMETERS = 852_608
SPECIAL_TOKENS = ("<pad>", "<unk>", "<bos>", "<eos>")
_MATRICES = {
    "attn.W_Q": "self_attn.q_proj",
    "attn.W_K": "self_attn.k_proj",
    "attn.W_V": "self_attn.v_proj",
    "attn.W_O": "self_attn.o_proj",
    "ffn.W1": "mlp.gate_proj",
    "ffn.W3": "mlp.up_proj",
    "ffn.W2": "mlp.down_proj",
}
_NORMS = {"norm1.gamma": "input_layernorm", "norm2.gamma": "post_attention_layernorm"}


def save_glass(folder: Path) -> Path:
    """Write model and tokenizer as a Hugging Face folder; returns the folder."""
    load_glass_model().save_pretrained(folder)
    load_glass_tokenizer().save_pretrained(folder)
    return folder


def load_glass_model() -> LlamaForCausalLM:
    """Build the model in float32, eval mode, straight from the package."""
    with np.load(_weights_folder() / "en.npz") as arrays:
        sizes = json.loads(str(arrays["__config__"]))
        weights = {name: np.asarray(arrays[name], np.float32) for name in arrays.files if name != "__config__"}
    config = LlamaConfig(
        vocab_size=sizes["vocab_size"],
        hidden_size=sizes["d_model"],
        intermediate_size=weights["blocks.0.ffn.W1"].shape[1],
        num_hidden_layers=sizes["n_layers"],
        num_attention_heads=sizes["n_heads"],
        num_key_value_heads=sizes["n_kv_heads"],
        max_position_embeddings=sizes["max_len"],
        rms_norm_eps=sizes["eps"],
        rope_parameters={"rope_type": "default", "rope_theta": sizes["rope_base"]},
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
    )
    model = LlamaForCausalLM(config)
    state = {"model.embed_tokens.weight": weights["E"], "model.norm.weight": weights["norm_f.gamma"]}
    for layer in range(config.num_hidden_layers):
        state |= _layer_state(weights, layer, heads={"attn.W_Q": sizes["n_heads"], "attn.W_K": sizes["n_kv_heads"]})
    tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in state.items()}
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    model.load_state_dict(tensors, strict=True)
    return model.eval()


def _layer_state(
    weights: dict[str, NDArray[np.float32]], layer: int, *, heads: dict[str, int]
) -> dict[str, NDArray[np.float32]]:
    source, target = f"blocks.{layer}.", f"model.layers.{layer}."
    state = {f"{target}{name}.weight": weights[source + ours] for ours, name in _NORMS.items()}
    for ours, name in _MATRICES.items():
        matrix = weights[source + ours].T  # [in, out] -> [out, in]
        state[f"{target}{name}.weight"] = _halves(matrix, heads[ours]) if ours in heads else matrix
    return state


def _halves(matrix: NDArray[np.float32], num_heads: int) -> NDArray[np.float32]:
    """Reorder each head's rows from (pair, member) to (member, pair)."""
    pairs = matrix.reshape(num_heads, -1, 2, matrix.shape[1])
    return pairs.swapaxes(1, 2).reshape(matrix.shape)


def load_glass_tokenizer() -> PreTrainedTokenizerFast:
    """Build the tokenizer: BPE over characters, spaces written as ``▁``; no chat template."""
    parts = json.loads((_weights_folder() / "en.tokenizer.json").read_text(encoding="utf-8"))
    merges = [(left, right) for left, right in parts["merges"]]
    vocabulary = [*SPECIAL_TOKENS, *parts["alphabet"], *(left + right for left, right in merges)]
    tokenizer = Tokenizer(BPE({token: index for index, token in enumerate(vocabulary)}, merges, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("\n|▁*[^▁\n]+|▁+"), "isolated")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", bos_token="<bos>", eos_token="<eos>"
    )


def _weights_folder() -> Path:
    spec = importlib.util.find_spec("glassllm")
    if spec is None or spec.origin is None:
        raise RuntimeError("the tests need glassllm==0.1.0: run `make test`, or pip install -e '.[dev]'")
    return Path(spec.origin).parent / "weights"
