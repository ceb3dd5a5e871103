"""The notebooks of examples/notebooks run from top to bottom, as they stand, and are kept without large outputs.

One kernel runs them all, for what it imports takes longer than most of them; names are cleared between.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from jupyter_client.manager import KernelManager
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted(ROOT.glob("examples/notebooks/*.ipynb"))
MOST_KEPT = 200_000
"""Bytes of the outputs that a notebook is kept with."""


def test_there_are_four():
    assert [path.stem.partition("_")[2] for path in NOTEBOOKS] == [
        "trace_and_validate",
        "train_on_your_model",
        "reproduce_ioi",
        "published_transcoders",
    ]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_valid_and_small_and_says_what_may_be_changed(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    outputs = [cell.get("outputs", []) for cell in notebook.cells]
    assert len(json.dumps(outputs)) <= MOST_KEPT
    parameters = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
    assert len(parameters) == 1
    assert parameters[0].source.startswith("QUICK = True")


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KernelManager]:
    """A kernel in an empty folder, whose hub cannot be reached."""
    place = tmp_path_factory.mktemp("notebooks")
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "PYTHONPATH": path,
            "HF_HUB_OFFLINE": "1",
            "IPYTHONDIR": str(place / "ipython"),
            "JUPYTER_RUNTIME_DIR": str(place / "runtime"),
        }.items():
            patch.setenv(name, value)
        manager = KernelManager(kernel_name="python3")
        manager.start_kernel(cwd=str(place))
        yield manager
        manager.shutdown_kernel(now=True)


def run(path: Path, kernel: KernelManager) -> list[dict[str, Any]]:
    """The outputs of a notebook; a cell that raises fails."""
    notebook = nbformat.read(path, as_version=4)
    notebook.cells.insert(0, nbformat.v4.new_code_cell("%reset -f"))
    NotebookClient(notebook, km=kernel, timeout=240).execute(reset_kc=True, cleanup_kc=False)
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert not [o for o in outputs if o["output_type"] == "error" or o.get("name") == "stderr"]
    return outputs


@pytest.mark.pages
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, kernel):
    outputs = run(path, kernel)
    shown = [output["data"] for output in outputs if "data" in output]
    assert any("<iframe" in data.get("text/html", "") for data in shown)
    text = "".join(data.get("text/html", "") + data.get("text/plain", "") for data in shown)
    assert {
        "trace_and_validate": "Validation of 20 edges",
        "train_on_your_model": "Cards of 256 features",
        "reproduce_ioi": "faithfulness of the circuit",
        "published_transcoders": "Validation of 10 edges",
    }[path.stem.partition("_")[2]] in text
