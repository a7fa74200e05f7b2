"""The tables and the plot of polynomial attention, from the records of poly_sketch.py."""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter
from poly_sketch_model import CONTROL
from report import replaced

from hyperattention.bench.timing import Timing, speedup
from hyperattention.report.picture import save_picture

ROOT = Path(__file__).parents[1]
RECORDS = ROOT / "benchmarks" / "records" / "poly_sketch.jsonl"
PAGE, PLOT = ROOT / "docs" / "relatives.md", ROOT / "docs" / "poly_sketch.png"
TRAINING, TIMES = (
    (f"<!-- {name}: begin (benchmarks/poly_sketch.py) -->", f"<!-- {name}: end -->")
    for name in ("polynomial training", "polynomial times")
)
BASELINE, BAR = "softmax", 1.15
FORWARD, BOTH = "forward", "forward and backward"
_COLOURS = {
    BASELINE: "0.4",
    "polynomial, exact": "tab:green",
    "learned sketch": "tab:blue",
    "random sketch": "tab:orange",
    CONTROL: "tab:red",
}


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def write_table(path: Path, page: Path = PAGE) -> None:
    records = read(path)
    parts = (training_table(records), TRAINING), (times_table(records), TIMES)
    page.write_text(replaced(page, *parts))


def pick(records: Sequence[dict], part: str) -> dict[str, list[dict]]:
    """The records of a part, by the name of the attention."""
    found: dict[str, list[dict]] = {}
    # of several trainings the one of the most bytes; times have no size of a training
    sizes = [record["size"] for record in records if record["part"] == part and "size" in record]
    size = max(sizes, key=lambda x: x["steps"] * x["batch"], default=None)
    for record in records:
        if record["part"] == part and record.get("size") == size:
            found.setdefault(record["attention"], []).append(record)
    return found


def training_table(records: Sequence[dict]) -> str:
    found = pick(records, "training")
    if BASELINE not in found:
        return "Nothing is recorded yet: run `python benchmarks/poly_sketch.py train`."
    base = {each["seed"]: each["held_out"] for each in found[BASELINE]}
    lines = [
        "| attention | parameters | seeds | held-out loss, nats a byte | above softmax, same seed | pairs weighed singly |",
        "|---|---|---|---|---|---|",
    ]
    for name, runs in found.items():
        losses = [run["held_out"] for run in runs]
        above = [run["held_out"] - base[run["seed"]] for run in runs if run["seed"] in base]
        beyond = "" if name == BASELINE else f"{statistics.fmean(above):+.3f}{_spread(above)}"
        share = f"{100 * runs[0]['share_of_pairs']:.1f} %"
        lines.append(
            f"| {name} | {runs[0]['parameters']:,} | {len(runs)} | {statistics.fmean(losses):.3f}{_spread(losses)} "
            f"| {beyond} | {share} |"
        )
    size = found[BASELINE][0]["size"]
    lines += ["", f"{size['layers']} layers of width {size['width']} with {size['heads']} heads; {size['steps']} steps of "
              f"{size['batch']} x {size['length']:,} bytes; r = {size['sketch']}, blocks of {size['block']}; ± is a "
              f"standard error over seeds. {where(records, 'training')}"]  # fmt: skip
    return "\n".join(lines)


def times_table(records: Sequence[dict]) -> str:
    parts = [part for part in (FORWARD, BOTH) if BASELINE in pick(records, part)]
    if not parts:
        return "Nothing is recorded yet: run `python benchmarks/poly_sketch.py time`."
    names = list(pick(records, parts[0]))
    lines = [
        f"| pass | tokens | {' | '.join(f'{name}, microseconds a token' for name in names)} |",
        "|" + "---|" * (2 + len(names)),
    ]
    for part in parts:
        cells = {(run["attention"], run["length"]): run["microseconds_a_token"] for run in records if run["part"] == part}
        lengths = sorted({length for _, length in cells})
        for length in lengths:
            lines.append(f"| {part} | {length:,} | {' | '.join(f'{cells[name, length]:.1f}' for name in names)} |")
        grown = [_growth([cells[name, length] for length in lengths], name) for name in names]
        lines.append(f"| {part} | largest / smallest | {' | '.join(grown)} |")
        ratios = [_ratio(pick(records, part)[name], name) for name in names]
        lines.append(f"| {part} | {lengths[-1]:,} / {lengths[0]:,}, within a round | {' | '.join(ratios)} |")
    first = pick(records, parts[0])[names[-1]][0]
    rounds = len(first["seconds"])
    lines += ["", f"One layer of width {first['width']} with {first['heads']} heads, r = {first['sketch']}, blocks of "
              f"{first['block']}, one text; what the one thread computed, without waiting, as other work ran "
              f"on the machine; medians of {rounds} rounds in which all lengths and layers ran in turn. The bar for "
              f"sketches is {BAR}x. {where(records, *parts)}"]  # fmt: skip
    return "\n".join(lines)


def _growth(values: Sequence[float], name: str) -> str:
    ratio = max(values) / min(values)
    return f"{ratio:.2f}x" + (" (**missed**)" if name != BASELINE and ratio > BAR else "")


def _ratio(runs: Sequence[dict], name: str) -> str:
    """The growth of the time a token from the shortest to the longest, from rounds in which both were timed."""
    first, *_, last = sorted(runs, key=lambda run: run["length"])
    found = speedup(*(Timing(tuple(x / run["length"] for x in run["computed_s"])) for run in (last, first)))
    mark = " (**missed**)" if name != BASELINE and found.value > BAR else ""
    return f"{found.value:.2f}x ({found.low:.2f} to {found.high:.2f}){mark}"


def _spread(values: Sequence[float]) -> str:
    return f" ± {statistics.stdev(values) / len(values) ** 0.5:.3f}" if len(values) > 1 else ""


def where(records: Sequence[dict], *parts: str) -> str:
    found = [record for record in records if record["part"] in parts]
    commits = ", ".join(dict.fromkeys(record["commit"][:10] for record in found))
    places = "; ".join(
        dict.fromkeys(
            f"{record['device']}, threads: {record['threads']}, torch {record['versions']['torch']}" for record in found
        )
    )
    return f"Measured on {places}; commits {commits}."


def plot(path: Path, out: Path = PLOT) -> None:
    """Plot loss against steps, and time a token against the length."""
    records = read(path)
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    _plot_losses(left, pick(records, "training"))
    _plot_times(right, pick(records, FORWARD))
    save_picture(figure, out, 110)


def _plot_losses(axes: Axes, found: dict[str, list[dict]]) -> None:
    for name, runs in found.items():
        steps = [step for step, _, _ in runs[0]["curve"]]
        losses = [[run["curve"][i][2] for run in runs] for i in range(len(steps))]
        axes.plot(steps, [statistics.fmean(x) for x in losses], color=_COLOURS[name], label=name)
        axes.fill_between(steps, [min(x) for x in losses], [max(x) for x in losses], color=_COLOURS[name], alpha=0.2)
    axes.set_xlabel("steps")
    axes.set_ylabel("held-out loss, nats a byte; mean and range of the seeds")
    axes.set_title("the same steps, batches and optimisers", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def _plot_times(axes: Axes, found: dict[str, list[dict]]) -> None:
    for name, runs in found.items():
        ordered = sorted(runs, key=lambda run: run["length"])
        lengths, times = [run["length"] for run in ordered], [run["microseconds_a_token"] for run in ordered]
        axes.plot(lengths, times, color=_COLOURS[name], marker="o", label=name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda length, _: f"{length / 1024:g}k"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda time, _: f"{time:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("tokens")
    axes.set_ylabel("microseconds a token, one layer, forward")
    axes.set_title("one thread of a CPU", fontsize=10)
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)
