"""``meft-run prune``: a model with a share of its weights set to zero, by SparseGPT."""

from __future__ import annotations

from pathlib import Path

import click

_PATH = click.Path(path_type=Path)
_COUNT = click.IntRange(min=1)


@click.command("prune", short_help="Set a share of a model's weights to zero (SparseGPT).")
@click.option("--model", type=_PATH, help="Folder of the model [default: the embedded SmolLM2-135M].")
@click.option("--data", type=_PATH, required=True, help="Calibration text, as for training; ordinary text is best.")
@click.option("--sparsity", required=True, help="Share of each layer's weights that goes (0.5), or 2:4, or 4:8.")
@click.option("-o", "--output", type=_PATH, required=True, help="Folder of the pruned model; must not be there yet.")
@click.option(
    "--method",
    type=click.Choice(["sparsegpt", "magnitude"]),
    default="sparsegpt",
    show_default=True,
    help="magnitude: the smallest weights, to compare with.",
)
@click.option("--sequences", type=_COUNT, default=128, show_default=True, help="Calibration sequences, at most.")
@click.option("--seq-len", type=click.IntRange(min=2), default=512, show_default=True, help="Tokens of each.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="Where a block is pruned [default: cuda if there].")
def prune_command(
    model: Path | None,
    data: Path,
    sparsity: str,
    output: Path,
    method: str,
    sequences: int,
    seq_len: int,
    device: str | None,
) -> None:
    """Prune the linear layers of every block, each on what the blocks before it give for the calibration text.

    What is written loads as any model: plan and train on it with --model. No more than one block at a time is on the
    device.
    """
    import torch

    from meft.runtime.cli.use import base_folder, placed_on
    from meft.runtime.pruning.folder import PruneOptions, prune_folder
    from meft.runtime.pruning.sparsegpt import parse_sparsity

    asked = parse_sparsity(sparsity)
    where = torch.device(placed_on(device))
    options = PruneOptions(
        base_folder(model),
        data,
        output,
        asked,
        "magnitude" if method == "magnitude" else "sparsegpt",
        sequences,
        seq_len,
        where,
    )
    layers = prune_folder(options, on_block=lambda done, count: click.echo(f"block {done} of {count}", err=True))
    zeros, numel = sum(layer.zeros for layer in layers), sum(layer.numel for layer in layers)
    error = sum(layer.error for layer in layers) / len(layers)
    click.echo(
        f"{method}, {asked}: {zeros:,} of {numel:,} weights in {len(layers)} layers are zero ({zeros / numel:.1%}); "
        f"what a layer gives changes by {error:.1%} (squared, mean over layers)"
    )
    click.echo(f"wrote {output}")
