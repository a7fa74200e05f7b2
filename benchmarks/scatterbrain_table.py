"""The tables and the picture of scatterbrain.py, from its records alone."""

import json
import statistics
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from pathlib import Path

import long_context_table
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from report import describe, replaced

from hyperattention.report.picture import save_picture

ROOT = Path(__file__).parents[1]
RECORDS, PICTURE, PAGE = (
    ROOT / "benchmarks/records/scatterbrain.jsonl",
    ROOT / "docs/scatterbrain.png",
    ROOT / "docs/relatives.md",
)
MARKS = "<!-- scatterbrain: begin (benchmarks/scatterbrain.py) -->", "<!-- scatterbrain: end -->"
COLOURS = {
    "sparse": "tab:red",
    "low rank": "tab:orange",
    "window and low rank": "tab:green",
    "blocks and low rank": "tab:blue",
    "window and uniform draws": "0.4",
}


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _of(records: Iterable[dict], part: str) -> list[dict]:
    return [record for record in records if record["part"] == part]


def _grouped(records: Iterable[dict], by: Callable[[dict], str | float]) -> Iterator[tuple[str | float, list[dict]]]:
    """Group records by a field of their key, in the order of the records."""
    found: dict[str | float, list[dict]] = {}
    for record in records:
        found.setdefault(by(record), []).append(record)
    return iter(found.items())


def _row(cells: Iterable[object]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def _table(head: list[str], lines: Iterable[Iterable[object]]) -> str:
    return "\n".join([_row(head), _row(["---"] * len(head)), *map(_row, lines)])


def _mean(records: list[dict], name: str = "error") -> float:
    return statistics.fmean(record["found"][name] for record in records)


def _share(part: float) -> str:
    return "0" if part == 0 else f"{100 * part:.2g} %"


def _factor(factor: float) -> str:
    return f"{factor:g}" if factor >= 1 else f"1/{1 / factor:g}"


def temperatures(records: list[dict], inputs: str) -> str:
    """Errors of one kind of inputs: a line for each factor, a column for each method; the smallest in bold."""
    own = [record for record in _of(records, "temperature") if record["key"]["inputs"] == inputs]
    names = list(dict.fromkeys(record["key"]["name"] for record in own))
    lines = []
    for factor, found in _grouped(own, lambda record: record["key"]["factor"]):
        errors = [_mean([record for record in found if record["key"]["name"] == name]) for name in names]
        shown = [f"**{error:.3f}**" if error == min(errors) else f"{error:.3f}" for error in errors]
        clamped = [record for record in found if "clamped" in record["found"]]
        lines.append([_factor(float(factor)), f"{_mean(found, 'entropy'):.2f}", *shown, _share(_mean(clamped, "clamped"))])
    pairs = {record["key"]["name"]: record["found"]["pairs"] for record in own}
    head = [f"{name}, {pairs[name]:.0f} pairs" for name in names]
    return _table(["scores times", "entropy, nats", *head, "rows clamped (blocks)"], lines)


def helps(records: list[dict]) -> str:
    own = _of(records, "helps")
    factors = list(dict.fromkeys(record["key"]["factor"] for record in own))
    lines = []
    for name, found in _grouped(own, lambda record: record["key"]["name"]):
        errors = [_mean([record for record in found if record["key"]["factor"] == factor]) for factor in factors]
        lines.append([name, f"{_mean(found, 'pairs'):.0f}", *(f"{error:.3f}" for error in errors)])
    return _table(["sinks, window and", "pairs", *(f"scores times {_factor(each)}" for each in factors)], lines)


def norms(records: list[dict]) -> str:
    own = _of(records, "norms")
    sides = list(own[0]["found"]["exponent"])
    lines = [
        [
            f"{record['key']['inputs']}, layer {record['key']['layer']}",
            *(f"{each:.1f}" for each in record["found"]["norms"]),
            *(f"{record['found']['exponent'][side]:.1f}" for side in sides),
        ]
        for record in own
    ]
    return _table(["inputs", "norm of q", "of k", "of v", *(f"exponent, {side}" for side in sides)], lines)


def model(records: list[dict], others: list[dict]) -> str:
    """Loss, retrieval and error: own records, and those of long_context.py of the same document and seed."""
    own = [(record["key"]["name"], record["key"]["method"], record["found"]) for record in _of(records, "model")]
    key = _of(records, "model")[0]["key"]
    same = [
        record for record in others
        if record["model"] == "reference" and record["run_on"] == "cpu" and record["dtype"] == "float32"
        and all(record[name] == key[name] for name in ("length", "document", "seed"))
    ]  # fmt: skip
    exact = next(record for record in same if record["name"] == "exact")
    named = {name for name, _, _ in own}
    wanted = [record for record in same if record["name"] in ("default", "control", "sinks_window")]
    found = [*own, *((each["name"], each["repr"], each) for each in wanted if each["name"] not in named)]
    lines = []
    for name, method, each in found:
        seconds = f"{each['processor_seconds']:.0f} s" if "processor_seconds" in each else "in long_context.jsonl"
        added = f"{each['nats_per_byte'] - exact['nats_per_byte']:+.4f}"
        lines.append([
            f"{name}: `{method}`", added, f"{100 * each['retrieval']:.1f} %", f"{each['error']['mean']:.3f}",
            f"{each['pairs']:,.0f}", seconds,
        ])  # fmt: skip
    lines.append(["exact", "0", f"{100 * exact['retrieval']:.1f} %", "0", f"{exact['pairs']:,.0f}", "in long_context.jsonl"])
    head = ["method", "added nats a byte", "answers right", "error", "pairs a query"]
    return _table([*head, "processor time of the pass"], lines)


def section(records: list[dict]) -> str:
    """Write all tables that there are records for, and where they were measured."""
    parts = {part for part, _ in groupby(record["part"] for record in records)}
    texts = []
    for inputs in dict.fromkeys(record["key"]["inputs"] for record in _of(records, "temperature")):
        texts += [
            f"Relative error, {inputs}, {_length(records, 'temperature'):,} tokens, causal:",
            temperatures(records, inputs),
        ]
    if "helps" in parts:
        texts += ["What helps: relative error, reference model, sinks 16 and window 128 in every line:", helps(records)]
    if "norms" in parts:
        texts += ["Norms, and the exponent `scale * ||q + k||^2`, medians:", norms(records)]
    if "model" in parts:
        length = _length(records, "model")
        texts += [f"The reference model at {length:,} bytes, one document, one seed, all layers replaced:"]
        texts += [model(records, read(long_context_table.RECORDS))]
    return "\n\n".join([*texts, *describe(records)])


def _length(records: list[dict], part: str) -> int:
    return _of(records, part)[0]["key"]["length"]


def write(records: list[dict], page: Path = PAGE) -> None:
    page.write_text(replaced(page, (f"\n{section(records)}\n", MARKS)))


def draw(records: list[dict], path: Path) -> None:
    """Plot error against the factor of the scores, a panel for each kind of inputs."""
    own = _of(records, "temperature")
    panels = list(_grouped(own, lambda record: record["key"]["inputs"]))
    figure = Figure(figsize=(5.5 * len(panels), 4.8), layout="constrained")
    for axes, (inputs, found) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        _panel(axes, str(inputs), found)
    save_picture(figure, path, 130)


def _panel(axes: Axes, inputs: str, records: list[dict]) -> None:
    for name, found in _grouped(records, lambda record: record["key"]["name"]):
        points = list(_grouped(found, lambda record: record["key"]["factor"]))
        x, y = [float(factor) for factor, _ in points], [_mean(each) for _, each in points]
        low, high = ([pick(record["found"]["error"] for record in each) for _, each in points] for pick in (min, max))
        axes.plot(x, y, marker="o", color=COLOURS[str(name)], label=f"{name}, {_mean(found, 'pairs'):.0f} pairs")
        axes.fill_between(x, low, high, color=COLOURS[str(name)], alpha=0.2)
    entropies = [(float(factor), _mean(each, "entropy")) for factor, each in _grouped(records, lambda r: r["key"]["factor"])]
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks([x for x, _ in entropies], [f"{_factor(x)}\n{entropy:.1f}" for x, entropy in entropies])
    axes.set_xlabel("factor of the scores, and mean entropy of softmax in nats")
    axes.set_ylabel("mean relative error, range over seeds")
    axes.set_title(f"{inputs}, {records[0]['key']['length']:,} tokens", fontsize=10)
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)
