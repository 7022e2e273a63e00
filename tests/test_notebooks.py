"""The notebooks run from top to bottom, with shorter settings in their parameter cell; in full
with `-m slow`.
"""

import os
import sys

import pytest

from support import paths, processes

nbformat = pytest.importorskip(
    "nbformat", reason="the notebooks extra is not installed: pip install '.[notebooks]'"
)
nbclient = pytest.importorskip(
    "nbclient", reason="the notebooks extra is not installed: pip install '.[notebooks]'"
)
pytest.importorskip(
    "ipykernel", reason="the notebooks extra is not installed: pip install '.[notebooks]'"
)

FOLDER = paths.ROOT / "notebooks"
SHORT = {
    "quickstart": "NUM_STEPS = 2\nNUM_LAYERS = 2",
    "routing_by_hand": "NUM_TOKENS = 32\nNUM_EXPERTS = 4\nNUM_SEEDS = 1",
    "convert_and_chat": "FOLDER = None\nNUM_LAYERS = 2\nMAX_NEW_TOKENS = 4\nLORA_STEPS = 2",
    "fine_tune": "FOLDER = None\nNUM_LAYERS = 2\nSFT_STEPS = 2\nSFT_RATE = 4e-3\nDPO_STEPS = 2\n"
    "DPO_RATE = 1e-4",
    "plan_a_pod": 'COMPILE = False\nTOPOLOGY = "v5p:4x8x8"',
}


SLOW = {"convert_and_chat", "fine_tune"}  # what they call has tests of its own


def run(name, monkeypatch, tmp_path, parameters=None):
    """The executed notebook; the installing cell is left out."""
    book = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    (cell,) = (cell for cell in book.cells if "parameters" in cell.metadata.get("tags", ()))
    if parameters is not None:
        assert [line.split(" = ")[0] for line in cell.source.splitlines()] == [
            line.split(" = ")[0] for line in parameters.splitlines()
        ]
        cell.source = parameters
    book.cells = [cell for cell in book.cells if "install" not in cell.metadata.get("tags", ())]
    # A kernel of this interpreter, whatever kernels the machine knows; one device, as a notebook
    # has; a shortened one mostly compiles.
    monkeypatch.setenv("XLA_FLAGS", processes.ONE_DEVICE if parameters else "")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(FOLDER.parent), *sys.path]))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    client = nbclient.NotebookClient(
        book, timeout=280, kernel_name="python3", resources={"metadata": {"path": str(FOLDER)}}
    )
    client.execute()
    return book


def figures(book):
    return sum(
        "image/png" in output.get("data", {})
        for cell in book.cells
        if cell.cell_type == "code"
        for output in cell.outputs
    )


@pytest.mark.filterwarnings("ignore")  # jupyter's own
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else [])
        for name in sorted(SHORT)
    ],
)
@pytest.mark.heavy
def test_notebook_runs_shortened(name, monkeypatch, tmp_path):
    assert figures(run(name, monkeypatch, tmp_path, SHORT[name])) >= 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", sorted(SHORT))
def test_notebook_runs_in_full(name, monkeypatch, tmp_path):
    assert figures(run(name, monkeypatch, tmp_path)) >= 1


def test_every_notebook_is_tested_and_small():
    paths = sorted(FOLDER.glob("*.ipynb"))
    assert [path.stem for path in paths] == sorted(SHORT)
    for path in paths:
        assert path.stat().st_size < 300_000
        assert not any(cell.get("outputs") for cell in nbformat.read(path, as_version=4).cells)
