"""Every tensor that the package makes from nothing names its dtype and its device, the CPU too."""

import ast
from pathlib import Path

import pytest
from torch.utils._device import _device_constructors

import hyperattention

SOURCE = Path(hyperattention.__file__).parent
# what a context of torch.device moves, and what reads the default dtype beside it
FACTORIES = {function.__name__ for function in _device_constructors()} | {
    "normal",
    "get_default_dtype",
    "get_default_device",
}


def unnamed(source: str) -> list[str]:
    """Find the factory calls that leave dtype or device to torch's global settings."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        match node.func:
            case ast.Attribute(value=ast.Name(id="torch"), attr=name) if name in FACTORIES:
                missing = {"dtype", "device"} - {keyword.arg for keyword in node.keywords}
                if missing:
                    found.append(
                        f"line {node.lineno}: {ast.unparse(node)} does not name its {' and '.join(sorted(missing))}"
                    )
    return found


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda path: str(path.relative_to(SOURCE)))
def test_no_factory_leaves_dtype_or_device_to_a_global_setting(path: Path) -> None:
    assert not unnamed(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("call", "missing"),
    [
        ("torch.zeros(3)", "device and dtype"),
        ("torch.arange(3, device=x.device)", "dtype"),
        ("torch.full((2,), -torch.inf, dtype=torch.float32)", "device"),
        ("torch.tensor([1.0], **options)", "device and dtype"),
        ("torch.as_tensor(out)", "device and dtype"),
    ],
)
def test_a_planted_violation_is_found(call: str, missing: str) -> None:
    planted = f"import torch\n\ndef make(x):\n    return {call}\n"
    assert unnamed(planted) == [f"line 4: {call} does not name its {missing}"]
    assert not unnamed("torch.zeros(3, dtype=torch.float32, device=x.device)\nx.new_zeros(3)\ntorch.zeros_like(x)")


def test_factories_are_called_by_their_full_names() -> None:
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module == "torch":
                assert not FACTORIES & {alias.name for alias in node.names}, f"{path}: call it torch.{node.names[0].name}"
