"""The notebook runs from top to bottom in a fresh kernel, as a reader would run it."""

import pathlib

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = pathlib.Path(__file__).parents[1] / "notebooks" / "quickstart.ipynb"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # jupyter's own, of paths and event loops
def test_notebook_runs_top_to_bottom(tmp_path, monkeypatch):
    monkeypatch.delenv("JAX_NUM_CPU_DEVICES")  # the notebook simulates its devices itself
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
    printed = "".join(
        output.get("text", "")
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if output["output_type"] == "stream"
    )
    assert "Paris" in printed
    assert "tensor" in printed
    assert (tmp_path / "notebook_run" / "loss.png").stat().st_size > 1000
