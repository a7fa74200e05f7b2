"""The methods that are judged on SmolLM2, by name: the presets, their controls, and plans from files."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from hyperattention import default_method, lean_method, load_plan, thorough_method
from hyperattention.bench.rows import control_of, window_of
from hyperattention.files.method_table import method_to_json
from hyperattention.methods.base import AttentionMethod
from hyperattention.methods.exact import Exact
from hyperattention.methods.method import Method
from hyperattention.methods.presets import HyperAttention
from hyperattention.select.draw import Draw
from hyperattention.select.draw_alike import DrawAlike
from hyperattention.select.locate.sinks import Sinks
from hyperattention.select.locate.window import Window
from hyperattention.select.score.hierarchical_search import HierarchicalSearch
from hyperattention.select.score.key_scan import KeyScan

LONG = 10**9
# a length at which the lean method searches as it does on most texts
SEARCHED = 8192
LEAN = Method(Sinks(16), Window(256), Draw(688, by=HierarchicalSearch()))


METHODS: dict[str, AttentionMethod] = {
    "exact": Exact(),
    "default": default_method(LONG),
    "thorough": thorough_method(LONG),
    # as many pairs as the plan for 500, the same in every head
    "alike_16": Method(Sinks(16), Window(64), DrawAlike(352, rows=16)),
    "lean": lean_method(SEARCHED),
    "lean_long": lean_method(LONG),
    "scan": Method(Sinks(16), Window(128), Draw(611, by=KeyScan(32, beyond=HierarchicalSearch(pooled=32)))),
    "control": control_of(LEAN),
    "sinks_window": window_of(LEAN),
    "published": HyperAttention(),
}

QUICK = ("exact", "default", "control", "lean")


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
