"""The methods that are judged on SmolLM2, by name: the presets, their controls, and plans from files."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from hyperattention import default_method, lean_method, load_plan, thorough_method
from hyperattention.bench.rows import control_of, find_default, window_of
from hyperattention.files.method_table import method_to_json
from hyperattention.methods.base import AttentionMethod
from hyperattention.methods.exact import Exact
from hyperattention.methods.method import Method
from hyperattention.methods.presets import HyperAttention
from hyperattention.select.draw_alike import DrawAlike
from hyperattention.select.locate.sinks import Sinks
from hyperattention.select.locate.window import Window

LONG = 10**9


def alike(num: int) -> Method:
    return Method(Sinks(16), Window(192), DrawAlike(num, 16, 16, most=16_384), tile=128)


METHODS: dict[str, AttentionMethod] = {
    "exact": Exact(),
    "default": default_method(LONG),
    "control": control_of(find_default()),
    "sinks_window": window_of(find_default()),
    "thorough": thorough_method(LONG),
    "lean": lean_method(LONG),
    "published": HyperAttention(),
    "alike_640": alike(640),
    "alike_1216": alike(1216),
    "alike_1680": alike(1680),
}

QUICK = ("exact", "default", "control", "thorough", "lean")


def methods_of(names: Sequence[str], plans: Sequence[Path]) -> dict[str, tuple[AttentionMethod, object]]:
    """The methods asked for and what a record says of them; a plan is long, so a record has the hash of its file."""
    unknown = [name for name in names if name not in METHODS]
    if unknown:
        raise SystemExit(f"--methods {' '.join(unknown)}: choose from {', '.join(METHODS)}; a plan is given by --plan")
    found: dict[str, tuple[AttentionMethod, object]] = {
        name: (METHODS[name], method_to_json(METHODS[name])) for name in names
    }
    for path in plans:
        plan = load_plan(path)
        about = {"type": "Plan", "tolerance": plan.tolerance, "crossover": plan.crossover,
                 "file": hashlib.sha256(path.read_bytes()).hexdigest()}  # fmt: skip
        found[f"plan_{plan.tolerance:g}"] = plan.method, about
    return found
