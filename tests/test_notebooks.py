"""Every notebook runs, and its rendered copy is of it."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, resources={"metadata": {"path": str(FOLDER)}}).execute()
    outputs = [output["output_type"] for cell in notebook.cells for output in cell.get("outputs", [])]
    assert "display_data" in outputs


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_its_rendered_copy_is_of_it(path: Path) -> None:
    copy = (FOLDER.parent / "docs" / "notebooks" / f"{path.stem}.md").read_text()
    for cell in nbformat.read(path, as_version=4).cells:
        assert cell.source.strip().rstrip(";") in copy
