"""Every notebook runs, and its rendered copy is of it."""

import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
SMALLER = {"expert_cache": ("ROWS = 12", "ROWS = 2"), "layer_topk": ("// 55]", "// 11]")}  # unless all tests are long


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    if path.stem in SMALLER and "MOE_ENVS_LONG" not in os.environ:
        whole, small = SMALLER[path.stem]
        assert whole in notebook.cells[0].source + notebook.cells[1].source
        for cell in notebook.cells:
            cell.source = cell.source.replace(whole, small)
    NotebookClient(notebook, resources={"metadata": {"path": str(FOLDER)}}).execute()
    outputs = [output["output_type"] for cell in notebook.cells for output in cell.get("outputs", [])]
    assert "display_data" in outputs


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_its_rendered_copy_is_of_it(path: Path) -> None:
    copy = (FOLDER.parent / "docs" / "notebooks" / f"{path.stem}.md").read_text()
    for cell in nbformat.read(path, as_version=4).cells:
        assert cell.source.strip().rstrip(";") in copy
