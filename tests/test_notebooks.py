"""The notebooks run from the first cell to the last, in a kernel of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])
# in a new interpreter: a kernel would inherit the interpreter of Triton, and the import hook has no place in it
RUN = """
import sys, nbformat
from nbclient import NotebookClient
notebook = nbformat.read(sys.argv[1], 4)
NotebookClient(notebook, timeout=500, kernel_name="python3").execute()
"""


@pytest.mark.heavy
@each_notebook
def test_it_runs(path: Path, tmp_path: Path) -> None:
    pytest.importorskip("nbclient", reason="the test extra installs nbclient")
    outside = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    # threads that wait by spinning lose to the other tests on the same cores
    outside["OMP_WAIT_POLICY"] = "passive"
    command = [sys.executable, "-c", RUN, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=outside)
    assert done.returncode == 0, done.stderr


@each_notebook
def test_its_output_is_small_and_complete(path: Path) -> None:
    cells = json.loads(path.read_text())["cells"]
    assert path.stat().st_size < 100_000
    assert cells[0]["cell_type"] == "markdown"
    assert "".join(cells[0]["source"]).startswith("# ")
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1)), "run it from the top, then save it"
    assert all(
        output.get("name") != "stderr" and output["output_type"] != "error" for cell in code for output in cell["outputs"]
    )
