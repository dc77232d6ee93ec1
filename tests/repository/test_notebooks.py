"""Every notebook runs from top to bottom, prints what is committed in it, and agrees with what was published."""

from __future__ import annotations

import base64
import importlib.util
from pathlib import Path
from typing import Any

import pytest
from places import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MISSING = [name for name in ("ipykernel", "nbclient", "nbformat") if importlib.util.find_spec(name) is None]
MAX_PICTURE_BYTES = 150_000
TOLERANCES = {"transfer_volume_vs_k": 0.02, "sparsity_and_prefetch": 0.06, "memory_budget": 0.03, "timeline": 1e-9}
"""Of the last table of each: published to two digits; the law of active rows; the ledger; bytes, which are exact."""

pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"{', '.join(MISSING)}: not installed (extra 'notebooks')")


COLUMNS = ["quantity", "predicted"]


def read(path: Path) -> Any:
    import nbformat

    return nbformat.read(path, as_version=4)


def executed(path: Path, folder: Path) -> Any:
    """The notebook after a run in ``folder``, by a kernel of this very interpreter whatever the user has installed."""
    from jupyter_client.kernelspec import KernelSpecManager
    from jupyter_client.manager import AsyncKernelManager
    from nbclient import NotebookClient

    notebook = read(path)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    manager = AsyncKernelManager(kernel_name="python3", kernel_spec_manager=KernelSpecManager(kernel_dirs=[]))
    NotebookClient(notebook, km=manager, timeout=300, resources={"metadata": {"path": str(folder)}}).execute()
    return notebook


def outputs(notebook: Any) -> list[Any]:
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def printed(notebook: Any) -> list[str]:
    return [output.text for output in outputs(notebook) if output.output_type == "stream"]


def pictures(notebook: Any) -> list[bytes]:
    found = [output.data.get("image/png") for output in outputs(notebook) if "data" in output]
    return [base64.b64decode(picture) for picture in found if picture is not None]


def predicted_and_seen(table: str) -> dict[str, tuple[float, float]]:
    """The last cell's table: a heading, then lines of a quantity and three numbers."""
    heading, *lines = table.splitlines()
    assert heading.split() in ([*COLUMNS, "published", "ratio"], [*COLUMNS, "observed", "ratio"])
    split = [line.rsplit(maxsplit=3) for line in lines]
    return {quantity: (float(predicted), float(published)) for quantity, predicted, published, _ in split}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_prints_what_is_committed(path, tmp_path) -> None:
    notebook = executed(path, tmp_path)  # raises for a cell that raises
    assert [output for output in outputs(notebook) if output.output_type == "error"] == []
    assert [output for output in outputs(notebook) if output.get("name") == "stderr"] == []
    assert printed(notebook) == printed(read(path))
    assert len(pictures(notebook)) == len(pictures(read(path)))
    for predicted, seen in predicted_and_seen(printed(notebook)[-1]).values():
        assert predicted == pytest.approx(seen, rel=TOLERANCES[path.stem])


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_committed_notebook_has_small_pictures(path) -> None:
    sizes = [len(picture) for picture in pictures(read(path))]
    assert sizes
    assert max(sizes) < MAX_PICTURE_BYTES


def test_the_transfer_notebook_ends_with_the_papers_two_figures() -> None:
    (path,) = [path for path in NOTEBOOKS if path.stem == "transfer_volume_vs_k"]
    last = [cell for cell in read(path).cells if cell.cell_type == "code"][-1]
    table = predicted_and_seen(last.outputs[0].text)
    assert [published for _, published in table.values()] == [0.56, 3.57]
