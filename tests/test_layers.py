"""The package is built in layers: no module imports one above its own, not even inside a function."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "src" / "hyperattention"
# from the bottom: each may import itself and what stands before it; PUBLIC is the package's own __init__.py
PUBLIC = "(public names)"
LAYERS = [
    *("types", "check", "extras", "random", "transforms", "problem", "tiling", "merge", "inputs", "exact"),
    *("kernels", "coreset", "fused", "live_rows", "select", "methods", "rivals", "error", "error.tolerance"),
    *("cache", "policies", "files", "call", "compiled", "result", "attention", "layouts"),
    *("synthetic", "bench", "experimental", PUBLIC, "integrations", "reference"),
    *("calibration", "evaluation", "generation", "report", "cli", "__main__"),
]


def sources() -> dict[str, str]:
    files = {path.relative_to(PACKAGE.parent).with_suffix(""): path.read_text() for path in PACKAGE.rglob("*.py")}
    return {".".join(path.parts).removesuffix(".__init__"): code for path, code in files.items()}


def layer(module: str) -> int:
    """Return the level of the longest name in the list that the module is, or lies in."""
    parts = module.split(".")[1:]
    names = [".".join(parts[:end]) for end in range(len(parts), 0, -1)] or [PUBLIC]
    levels = [LAYERS.index(name) for name in names if name in LAYERS]
    assert levels, f"{module} has no layer: give it one in LAYERS, above all that it imports"
    return levels[0]


def imported(code: str, modules: dict[str, str]) -> list[str]:
    """List the modules of the package that a source imports, wherever in it."""
    names = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            names += [name.name for name in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"line {node.lineno}: write imports in full, from {PACKAGE.name} on"
            whole = [f"{node.module}.{name.name}" for name in node.names]
            names += [name if name in modules else str(node.module) for name in whole]
    return [name for name in names if name.split(".")[0] == PACKAGE.name]


def upward(modules: dict[str, str]) -> list[str]:
    found = []
    for module, code in sorted(modules.items()):
        found += [f"{module} imports {name}" for name in imported(code, modules) if layer(name) > layer(module)]
    return found


def test_no_module_imports_one_above_it():
    assert upward(sources()) == []


def test_an_import_upward_is_found_even_in_a_function():
    modules = sources()
    modules["hyperattention.select.draw"] += "\ndef late():\n    from hyperattention.methods import method\n"
    modules["hyperattention.merge"] += "\nimport hyperattention as ha\n"
    assert upward(modules) == [
        "hyperattention.merge imports hyperattention",
        "hyperattention.select.draw imports hyperattention.methods.method",
    ]


def order(modules: dict[str, str]) -> list[str]:
    return [*TopologicalSorter({name: imported(code, modules) for name, code in modules.items()}).static_order()]


def test_within_a_layer_no_imports_go_in_a_circle():
    modules = sources()
    assert set(order(modules)) == set(modules)
    modules["hyperattention.select.density"] += "\nfrom hyperattention.select import draw\n"
    with pytest.raises(CycleError):
        order(modules)


def test_every_layer_is_there():
    found = {layer(module) for module in sources()}
    assert [name for place, name in enumerate(LAYERS) if place not in found] == []
