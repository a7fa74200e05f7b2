"""The package is built in layers: no module imports one above its own, not even inside a function."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "src" / "hyperattention"
# from the bottom: each may import itself and what stands before it; PUBLIC is the package's own __init__.py
PUBLIC = "(public names)"
LAYERS = [
    *("types", "check", "extras", "random", "transforms", "problem", "tiling", "merge", "remainder", "features", "inputs"),
    *("exact", "kernels", "coreset", "fused", "live_rows", "sensitivity", "select", "pooled", "methods", "rivals", "error"),
    *(
        "error.tolerance",
        "cache",
        "policies",
        "files",
        "call",
        "compiled",
        "result",
        "attention",
        "layouts",
        "nn",
        "distributed",
    ),
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
    """List the modules of the package that a source imports, wherever in it, by a statement or by a name in a string."""
    names = []
    for node in ast.walk(ast.parse(code)):
        names += named(node, modules)
        if isinstance(node, ast.Import):
            names += [name.name for name in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"line {node.lineno}: write imports in full, from {PACKAGE.name} on"
            whole = [f"{node.module}.{name.name}" for name in node.names]
            names += [name if name in modules else str(node.module) for name in whole]
    return [name for name in names if name.split(".")[0] == PACKAGE.name]


def named(node: ast.AST, modules: dict[str, str]) -> list[str]:
    """List the module that a string names in full, and the one that a call such as `import_module` is given."""
    if isinstance(node, ast.Constant):
        return [node.value] if node.value in modules and node.value != PACKAGE.name else []
    if not isinstance(node, ast.Call) or not node.args:
        return []
    function = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    if function not in ("import_module", "__import__"):
        return []
    given = node.args[0]
    parts = given.values if isinstance(given, ast.JoinedStr) else [given]
    start = str(parts[0].value) if isinstance(parts[0], ast.Constant) else ""
    whole = isinstance(given, ast.Constant) and not start.startswith(".")
    assert whole or not start.startswith((".", PACKAGE.name)), (
        f"line {node.lineno}: write imports in full, from {PACKAGE.name} on"
    )
    return [start] if start == PACKAGE.name else []


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


def test_an_import_by_a_string_is_found():
    modules = sources()
    modules["hyperattention.select.draw"] += "\ndef late():\n    importlib.import_module('hyperattention.methods.method')\n"
    modules["hyperattention.merge"] += "\n__import__('hyperattention')\n"
    modules["hyperattention.tiling"] += "\nLATER = {'Window': 'hyperattention.select.locate.window'}\n"
    assert upward(modules) == [
        "hyperattention.merge imports hyperattention",
        "hyperattention.select.draw imports hyperattention.methods.method",
        "hyperattention.tiling imports hyperattention.select.locate.window",
    ]
    for hidden in ("f'hyperattention.methods.{name}'", "'.methods', 'hyperattention'", "f'.{name}', 'hyperattention'"):
        with pytest.raises(AssertionError, match="write imports in full"):
            imported(f"import_module({hidden})", modules)
    # of another package, whatever its name
    assert imported("import_module('accelerate.utils'), import_module(name), import_module(f'{name}.utils')", modules) == []


def order(modules: dict[str, str]) -> list[str]:
    return [*TopologicalSorter({name: {*imported(code, modules)} - {name} for name, code in modules.items()}).static_order()]


def test_within_a_layer_no_imports_go_in_a_circle():
    modules = sources()
    assert set(order(modules)) == set(modules)
    modules["hyperattention.select.density"] += "\nfrom hyperattention.select import draw\n"
    with pytest.raises(CycleError):
        order(modules)


def test_every_layer_is_there():
    found = {layer(module) for module in sources()}
    assert [name for place, name in enumerate(LAYERS) if place not in found] == []
