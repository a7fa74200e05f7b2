"""Plots of error against time: never time alone."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from hyperattention.bench.case import Case
from hyperattention.bench.error import Error
from hyperattention.bench.speed import Speed
from hyperattention.reference.evaluate import ModelJudgement
from hyperattention.report.picture import save_picture

_COLOURS = {
    "exact": "0.4",
    "sinks_window": "tab:red",
    "control": "tab:orange",
    "published": "tab:purple",
    "default": "tab:blue",
}


def _point(axes: Axes, row: str, label: str, seconds: float, error: Error | None) -> None:
    # exact attention in a model is not audited: its error is zero by definition
    mean, low, high = (0.0, 0.0, 0.0) if error is None else (error.mean, error.low, error.high)
    spread = [[mean - low], [high - mean]]
    axes.errorbar([seconds], [mean], yerr=spread, fmt="o", capsize=4, color=_COLOURS.get(row, "0.2"), label=label)


def scale_seconds(axes: Axes) -> None:
    """Set a logarithmic scale with readable numbers on an axis of seconds."""
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda seconds, _: f"{seconds:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _finish(axes: Axes, title: str) -> None:
    scale_seconds(axes)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("time of attention, seconds")
    axes.set_ylabel("mean relative error, 95% interval")
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.13))


def plot_demo(path: Path, judgements: Sequence[ModelJudgement], model: str, speeds: Sequence[Speed], case: Case) -> None:
    """Plot error against time, on the model and on structured inputs side by side.

    Args:
        path: the file, a PNG or another format of matplotlib.
        judgements: results on the model.
        model: the model's name.
        speeds: results on structured inputs.
        case: the case of the structured inputs.
    """
    figure = Figure(figsize=(12, 6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for each in judgements:
        asked = "" if each.retrieval is None else f", retrieval {each.retrieval:.0%}"
        _point(left, each.row, f"{each.label}: {each.added_nats:+.3f} nats{asked}", each.attention.median, each.error)
    _finish(left, f"{model}: all attention of one pass")
    for speed in speeds:
        _point(right, speed.row, f"{speed.label}: {speed.ratio.value:.1f}x", speed.timing.median, speed.error)
    _finish(right, f"structured inputs, scattered heads: {case.length:,} tokens, {case.title}")
    save_picture(figure, path, 130)


def plot_bench(path: Path, results: Mapping[Case, Sequence[Speed]]) -> None:
    """Plot time, error and memory against length, with a column for each kind of case.

    Args:
        path: the file, a PNG or another format of matplotlib.
        results: the rows of every case.
    """
    titles = list(dict.fromkeys(case.title for case in results))
    figure = Figure(figsize=(3.6 * len(titles), 8.5), layout="constrained")
    grid = figure.subplots(3, len(titles), squeeze=False, sharex=True)
    for column, title in enumerate(titles):
        time, error, memory = grid[:, column]
        cases = [case for case in results if case.title == title]
        for row in dict.fromkeys(speed.row for case in cases for speed in results[case]):
            picked = [(case.length, speed) for case in cases for speed in results[case] if speed.row == row]
            style = {"color": _COLOURS.get(row, "0.2"), "marker": "o", "label": picked[-1][1].label}
            time.plot([n for n, _ in picked], [s.timing.median for _, s in picked], **style)
            loaded = [(n, s.error) for n, s in picked if s.error]
            spread = [[e.mean - e.low for _, e in loaded], [e.high - e.mean for _, e in loaded]]
            error.errorbar([n for n, _ in loaded], [e.mean for _, e in loaded], yerr=spread, capsize=3, **style)
            weighed = [(n, s.memory_bytes / 2**20) for n, s in picked if s.memory_bytes]
            memory.plot([n for n, _ in weighed], [size for _, size in weighed], **style)
        time.set_title(title, fontsize=9)
        for axes, name in ((time, "seconds"), (error, "mean relative error, 95% interval"), (memory, "peak memory, MiB")):
            axes.set_xscale("log", base=2)
            axes.grid(alpha=0.3)
            axes.set_ylabel(name if column == 0 else "")
        time.set_yscale("log")
        memory.set_xlabel("tokens")
    grid[0, 0].legend(fontsize=8)
    save_picture(figure, path, 110)
