"""A model of 60,000 random parameters with a tokenizer, facts for it, and a plan: what campaigns run by the hundred."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from click.testing import CliRunner
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from meft.planner.cli.main import command as planner

WORDS = ("alice", "rabbit", "queen", "hatter", "dormouse", "duchess", "gryphon", "cheshire")
SPECIAL = ("<pad>", "<unk>", "<bos>", "<eos>")


def make_tiny(folder: Path) -> None:
    """Write ``model/``, ``facts.jsonl`` and ``plan.json`` (Key-Experts, so that routers are saved too)."""
    folder.mkdir(parents=True, exist_ok=True)
    _save_model(folder / "model")
    facts = ({"prompt": f"{one} met", "completion": f" {other}"} for one in WORDS for other in WORDS[:3])
    (folder / "facts.jsonl").write_text("".join(json.dumps(fact) + "\n" for fact in facts))
    words = ["--model", folder / "model", "--gpu", "emulated", "--gpu-mem", "24MiB", "--host-mem", "1GB"]
    words += ["--batch-size", 2, "--seq-len", 8, "--grad-accum", 2, "--top-k", 4, "--adapter-width", 64]
    words += ["--routing", "key-experts", "--max-slowdown", 1000, "-o", folder / "plan.json"]
    done = CliRunner().invoke(planner, [str(word) for word in words])
    if not (folder / "plan.json").exists():
        raise RuntimeError(f"meft-plan: {done.output}")


def _save_model(folder: Path) -> None:
    torch.manual_seed(0)
    vocabulary = [*SPECIAL, *WORDS, "met"]
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer = Tokenizer(WordLevel({word: place for place, word in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", bos_token="<bos>", eos_token="<eos>"
    ).save_pretrained(folder)
