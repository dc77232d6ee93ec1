"""Run the notebooks again and keep what they print and draw: python scripts/run_notebooks.py [NOTEBOOK ...]."""

from __future__ import annotations

import tempfile
from pathlib import Path

import click
import nbformat
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"


def run(path: Path) -> None:
    """Execute one notebook in an empty folder, by this interpreter, and write it back without times of execution."""
    notebook = nbformat.read(path, as_version=4)  # type: ignore[no-untyped-call]
    manager = AsyncKernelManager(kernel_name="python3", kernel_spec_manager=KernelSpecManager(kernel_dirs=[]))
    with tempfile.TemporaryDirectory() as folder:
        resources = {"metadata": {"path": folder}}
        NotebookClient(notebook, km=manager, timeout=600, resources=resources, record_timing=False).execute()
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    nbformat.write(notebook, path)  # type: ignore[no-untyped-call]


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("notebooks", nargs=-1, type=click.Path(exists=True, dir_okay=False, path_type=Path))
def main(notebooks: tuple[Path, ...]) -> None:
    """Run notebooks (all of them by default) again and keep what they print and draw."""
    for path in notebooks or sorted(NOTEBOOKS.glob("*.ipynb")):
        click.echo(f"running {path.name}")
        run(path)


if __name__ == "__main__":
    main()
