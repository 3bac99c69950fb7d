"""The notebook is stored without outputs, and runs from top to bottom on a server that it starts itself."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat import NotebookNode

from tests.support.paths import EXAMPLES

PATH = EXAMPLES / "tour.ipynb"


@pytest.fixture
def notebook() -> NotebookNode:
    return nbformat.read(PATH, as_version=4)


def test_the_notebook_is_stored_without_outputs(notebook: NotebookNode):
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert len(code) >= 8
    assert all(not cell.outputs and cell.execution_count is None for cell in code)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_notebook_runs(notebook: NotebookNode, tmp_path: Path):
    client = NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()
    outputs = [
        "".join(output.get("text", "") for output in cell.get("outputs", [])) for cell in notebook.cells
    ]
    assert any("! 12/ 6= 2, 18- 2= 16, 16+ 23= 39" in text for text in outputs)
    assert any("803 tokens, 239 on the critical path, 809 in one context" in text for text in outputs)
    assert sum("complete: True" in text for text in outputs) == 1
    assert any("report.html" in text for text in outputs)
    assert not list(tmp_path.iterdir()), "it writes only into a directory of its own"
