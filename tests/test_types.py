"""What the public names promise to type checkers: `user_code.py` passes pyright at its strictest, and mistakes do not."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
SOURCE = TESTS.parent / "src"
MISTAKES = """
import torch

import hyperattention as ha

q = torch.ones(1, 1, 8, 4)
ha.measured_attention(q, q, q, rows=64)
ha.attention(q, q, q, method="exact")
ha.measured_attention(q, q, q).error
print(ha.attention(q, q, q).lse, ha.Method(ha.Window("16")))
"""


@pytest.fixture(scope="module")
def complaints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Check code as in a user's project, where the package is installed and not among the files checked."""
    pytest.importorskip("pyright", reason="the dev extra installs pyright")
    pytest.importorskip("transformers", reason="the user's code imports it")
    folder = tmp_path_factory.mktemp("project")
    files = {"user_code.py": (TESTS / "user_code.py").read_text(), "mistakes.py": MISTAKES}
    settings = {"include": [*files], "typeCheckingMode": "strict", "pythonVersion": "3.11"}
    for name, text in (files | {"pyrightconfig.json": json.dumps(settings)}).items():
        (folder / name).write_text(text)
    command = [sys.executable, "-m", "pyright", "--outputjson", "--project", str(folder), "--pythonpath", sys.executable]
    # where this interpreter finds packages, and these sources before all others
    environment = os.environ | {"PYTHONPATH": str(SOURCE), "PYRIGHT_PYTHON_IGNORE_WARNINGS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found["summary"]["filesAnalyzed"] == len(files)
    told: dict[str, list[str]] = {name: [] for name in files}
    for each in found["generalDiagnostics"]:
        told[Path(each["file"]).name].append(f"line {each['range']['start']['line'] + 1}: {each['message']}")
    return told


@pytest.mark.slow
def test_users_code_passes_the_strictest_checks(complaints):
    assert complaints["user_code.py"] == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "mistake",
    [
        'line 7: No parameter named "rows"',
        'line 8: Argument of type "Literal[\'exact\']" cannot be assigned to parameter "method"',
        'line 9: Cannot access attribute "error" for class "AttentionResult"',
        'line 10: Cannot access attribute "lse" for class "Tensor"',
        'line 10: Argument of type "Literal[\'16\']" cannot be assigned to parameter "size"',
    ],
)
def test_mistakes_are_told(complaints, mistake):
    assert any(told.startswith(mistake) for told in complaints["mistakes.py"]), complaints["mistakes.py"]


def test_the_package_says_that_it_is_typed():
    assert (SOURCE / "hyperattention" / "py.typed").is_file()
