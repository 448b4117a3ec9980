"""The notebooks run, and show what they are stored with."""

import re
from pathlib import Path

import nbclient
import nbformat
import pytest

NOTEBOOKS = sorted((Path(__file__).parents[2] / "docs/notebooks").glob("*.ipynb"))


def shown(notebook):
    """Kinds of the outputs of each cell, and what it printed, with any numbers."""
    found = []
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            printed = re.sub(r"[\d.]+", "0", output.get("text", ""))
            found.append((cell.source, output.output_type, sorted(output.get("data", ())), printed))
    return found


@pytest.mark.filterwarnings("ignore")  # of the machinery of notebooks in this process
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_shows_what_it_is_stored_with(path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    stored = nbformat.read(path, 4)
    fresh = nbclient.NotebookClient(
        nbformat.read(path, 4), timeout=120, resources={"metadata": {"path": path.parent}}
    ).execute()
    assert shown(fresh) == shown(stored)
    counts = [c.execution_count for c in stored.cells if c.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1)), "run it from the top"


def test_notebooks_are_there_and_show_tables_and_plots():
    assert len(NOTEBOOKS) >= 2
    kinds = {
        kind for path in NOTEBOOKS for *_, data, _ in shown(nbformat.read(path, 4)) for kind in data
    }
    assert {"text/html", "text/plain", "image/png"} <= kinds


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_nothing_names_the_machine_that_ran_it(path):
    """No path into a folder of a user, or to installed packages."""
    assert not re.findall(r"/[\w./-]+/site-packages|/home/\w+|/Users/\w+", path.read_text())
