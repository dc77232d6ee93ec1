"""``meft-run export``: an adapter folded into its base, where that is possible."""

from __future__ import annotations

from pathlib import Path

import click

from meft.runtime.cli.use import adapter_folder

_PATH = click.Path(path_type=Path)


@click.command("export", short_help="Fold an adapter into its base model, where the FFN allows it.")
@click.option("--model", type=_PATH, required=True, help="Folder of the base model.")
@click.option("--adapter", type=_PATH, required=True, help="Folder of a trained adapter, or of its run.")
@click.option("-o", "--output", type=_PATH, required=True, help="Where the model goes: an ordinary folder.")
def export_command(model: Path, adapter: Path, output: Path) -> None:
    """Write the base with the adapter's rows as more neurons of its FFNs: a model that needs nothing of meft.

    That takes a plain FFN with ReLU (GPT-2, GPT-NeoX, Phi with relu) and exact routing. Beside a gated FFN, as LLaMA
    has, rows do not fold: the command says so, and the adapter folder is what to share.
    """
    from meft.runtime.session.model_loading import existing_folder
    from meft.runtime.use.folding import export_folded

    inner = export_folded(existing_folder(model), adapter_folder(adapter), output)
    click.echo(f"wrote {output}: an ordinary model with an intermediate size of {inner:,}")
