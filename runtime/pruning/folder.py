"""From a model's folder and a file of text to a pruned model's folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from meft.planner.base.errors import UsageError
from meft.planner.base.files import replace_folder, writing
from meft.runtime.data.loading import load_dataset
from meft.runtime.pruning.model import Method, PrunedLayer, prune_model
from meft.runtime.pruning.sparsegpt import Sparsity
from meft.runtime.session.model_folder import load_causal_lm
from meft.runtime.session.model_loading import check_token_ids, load_tokenizer

RECORD_NAME = "pruning.json"
"""In the pruned folder: what was done to each layer."""


@dataclass(frozen=True)
class PruneOptions:
    """What is pruned, and how."""

    model: Path
    data: Path
    output: Path
    sparsity: Sparsity
    method: Method = "sparsegpt"
    num_sequences: int = 128
    seq_len: int = 512
    device: torch.device | None = None


def prune_folder(options: PruneOptions, *, on_block: Callable[[int, int], None]) -> list[PrunedLayer]:
    """Prune the model of a folder and write the folder of the pruned one, whole or not at all.

    Raises:
        UsageError: an output that is there already, a model or data that cannot be read, too little text.
        MachineError: the disk refuses.
    """
    if options.output.exists():
        raise UsageError(f"-o {options.output}: is there already; choose another name, or remove it")
    tokenizer = load_tokenizer(options.model)
    sequences = calibration(options, tokenizer)
    model = load_causal_lm(options.model, dtype="auto").eval()
    vocabulary = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    check_token_ids((ids[0].tolist() for ids in sequences), vocabulary, where=str(options.data))
    layers = prune_model(
        model, sequences, options.sparsity, method=options.method, device=options.device, on_block=on_block
    )
    record = {
        "method": options.method,
        "sparsity": str(options.sparsity),
        "sequences": len(sequences),
        "tokens": sum(ids.numel() for ids in sequences),
        "layers": [vars(layer) for layer in layers],
    }

    def write(folder: Path) -> None:
        model.save_pretrained(folder)  # type: ignore[operator]
        for path in _beside_weights(options.model):
            if not (folder / path.name).exists():
                shutil.copyfile(path, folder / path.name)
        (folder / RECORD_NAME).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")

    with writing(options.output):
        replace_folder(options.output, write)
    return layers


def calibration(options: PruneOptions, tokenizer: Any) -> list[torch.Tensor]:
    """Sequences ``[1, seq_len]`` of the data's tokens, one text after the other, as many as there are up to
    ``num_sequences``; where there is less than one, all of it."""
    wanted = options.num_sequences * options.seq_len
    tokens: list[int] = []
    dataset = load_dataset(options.data, tokenizer, seq_len=max(options.seq_len, 2), show=0)
    for example in dataset.examples:
        tokens += example.input_ids
        if len(tokens) >= wanted:
            break
    length = min(options.seq_len, len(tokens))
    count = min(len(tokens) // length, options.num_sequences)
    return list(torch.tensor(tokens[: count * length]).view(count, 1, length))


def _beside_weights(folder: Path) -> Iterable[Path]:
    """Tokenizer, template and generation files, which loading the pruned folder needs too."""
    weights = (".safetensors", ".bin", ".index.json", ".gguf")
    return (path for path in sorted(folder.iterdir()) if path.is_file() and not path.name.endswith(weights))
