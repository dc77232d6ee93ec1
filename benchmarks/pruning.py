"""What pruning costs SmolLM2-135M in loss on prose: SparseGPT beside magnitude pruning.

    python benchmarks/pruning.py [--sequences 64] [--output FILE]

prunes the embedded model to 0.5, 2:4 and 4:8 by both methods, on half of the factbook's texts, and prints the loss per
token of the other half, of the model as it is and of each pruned one; one JSON object a line to ``--output``. No layer
may be further off than by magnitude; how many are is printed.
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path

import torch

from meft.runtime.data.embedded import smollm2_folder
from meft.runtime.data.task_sources import factbook_prose
from meft.runtime.pruning.model import METHODS, prune_model
from meft.runtime.pruning.sparsegpt import parse_sparsity
from meft.runtime.session.model_folder import load_causal_lm
from meft.runtime.session.model_loading import load_tokenizer

SPARSITIES = ("0.5", "2:4", "4:8")
SEQ_LEN = 256
HELD_OUT = 60
"""Texts whose loss is told."""


@torch.no_grad()
def prose_loss(model: torch.nn.Module, sequences: list[torch.Tensor]) -> float:
    """Mean loss per predicted token."""
    total = count = 0.0
    for ids in sequences:
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
        total += float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
        count += ids.shape[1] - 1
    return total / count


def main() -> None:
    """Prune, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=64, help="calibration sequences")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    folder = smollm2_folder()
    tokenizer, base = load_tokenizer(folder), load_causal_lm(folder, dtype=torch.float32).eval()
    texts = [tokenizer(text, return_tensors="pt").input_ids[:, :SEQ_LEN] for text in factbook_prose()]
    held_out, rest = texts[:HELD_OUT], torch.cat(texts[HELD_OUT:], dim=1)
    count = min(options.sequences, rest.shape[1] // SEQ_LEN)
    calibration = list(rest[:, : count * SEQ_LEN].view(count, 1, SEQ_LEN))
    rows = [{"method": "none", "sparsity": "0", "prose_loss": prose_loss(base, held_out)}]
    errors: dict[tuple[str, str], list[float]] = {}
    print(rows[0], flush=True)
    for sparsity in SPARSITIES:
        for method in METHODS:
            model = copy.deepcopy(base)
            layers = prune_model(model, calibration, parse_sparsity(sparsity), method=method)
            errors[sparsity, method] = [layer.error for layer in layers]
            rows.append({
                "method": method,
                "sparsity": sparsity,
                "prose_loss": prose_loss(model, held_out),
                "mean_layer_error": sum(errors[sparsity, method]) / len(layers),
                "calibration_tokens": count * SEQ_LEN,
            })  # fmt: skip
            print(rows[-1], flush=True)
        pairs = zip(errors[sparsity, "sparsegpt"], errors[sparsity, "magnitude"], strict=True)
        closer = sum(own < other for own, other in pairs)
        print(f"{sparsity}: closer than by magnitude in {closer} of {len(errors[sparsity, 'sparsegpt'])} layers")
    if options.output is not None:
        options.output.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
