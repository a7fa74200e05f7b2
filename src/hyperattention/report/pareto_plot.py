"""The plot of a comparison over budgets: error against time on both kinds of inputs, and added loss against pairs."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hyperattention.bench.candidates import OWN, Candidate
from hyperattention.bench.frontier import Point
from hyperattention.reference.evaluate import ModelJudgement
from hyperattention.report.picture import save_picture
from hyperattention.report.plots import scale_seconds

_EXACT = "0.4"
# added losses below this, in nats a byte, are drawn on a linear scale, because they may be zero or negative
_LINEAR_NATS = 1e-3


def plot_pareto(
    path: Path, points: Mapping[str, Sequence[Point]], who: Sequence[Candidate], judgements: Sequence[ModelJudgement] = ()
) -> None:
    """Plot a panel for each kind of inputs, and one for the loss if it was measured.

    Args:
        path: the file, a PNG or another format of matplotlib.
        points: the measured points, by the title of the panel.
        who: the methods and budgets.
        judgements: results of a model that ran some or all of the methods.
    """
    panels = len(points) + bool(judgements)
    figure = Figure(figsize=(5.6 * panels, 6.6), layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    styles = _styles(who)
    for panel, (title, found) in zip(axes, points.items(), strict=False):
        _plot_errors(panel, found, styles)
        panel.set_title(title, fontsize=10)
    if judgements:
        _plot_losses(axes[-1], judgements, who, styles)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, loc="outside lower center", ncols=5)
    save_picture(figure, path, 130)


def _styles(who: Sequence[Candidate]) -> dict[str, dict]:
    """Choose a colour for each family, and a dashed line for the oracle, which is not a usable method."""
    colours = (colormaps["tab20"](number) for number in range(2, 20))
    # shades of one colour for this project's methods; the method that spends most time on selection is the darkest
    own = (colormaps["Blues"](0.95 - 0.13 * number) for number in range(len(OWN)))
    styles: dict[str, dict] = {}
    for candidate in who:
        if candidate.family not in styles and not candidate.exact:
            ours = candidate.family in OWN
            colour = next(own) if ours else next(colours, "0.2")
            line, wide = ("--" if candidate.oracle else "-"), (2.4 if ours else 1.2)
            styles[candidate.family] = {"color": colour, "linestyle": line, "linewidth": wide}
    return styles


def _plot_errors(panel: Axes, points: Sequence[Point], styles: Mapping[str, dict]) -> None:
    # a method that saved no pairs is exact up to rounding, and would lie far below all other points
    shown = sorted((each for each in points if each.approximated), key=lambda each: each.cost.pairs)
    for family, style in styles.items():
        curve = [each for each in shown if each.candidate.family == family]
        if not curve:
            continue
        times, errors = [each.timing.median for each in curve], [each.error.mean for each in curve]
        below = [each.error.mean - each.error.low for each in curve]
        above = [each.error.high - each.error.mean for each in curve]
        panel.errorbar(times, errors, yerr=[below, above], capsize=2, label=curve[0].candidate.title, **style)
        for each, seconds, error in zip(curve, times, errors, strict=True):
            # a dominated point is hollow
            face = style["color"] if each.front else "white"
            panel.plot([seconds], [error], "o", color=style["color"], markerfacecolor=face, markersize=6)
    for each in points:
        if each.candidate.exact:
            # a logarithmic axis cannot show an error of 0
            panel.axvline(each.timing.median, color=_EXACT, linestyle=":", label=f"{each.candidate.title}: error 0")
    scale_seconds(panel)
    panel.set_yscale("log")
    panel.set_xlabel("time of the attention calls, seconds")
    panel.set_ylabel("mean relative error, 95% interval; hollow: dominated")
    panel.grid(alpha=0.3, which="both")


def _plot_losses(
    panel: Axes, judgements: Sequence[ModelJudgement], who: Sequence[Candidate], styles: Mapping[str, dict]
) -> None:
    found = {each.row: each for each in judgements}
    for family, style in styles.items():
        curve = [found[each.row.name] for each in who if each.family == family and each.row.name in found]
        pairs, added = [each.cost.pairs for each in curve], [each.added_nats for each in curve]
        panel.errorbar(pairs, added, yerr=[each.added_error or 0.0 for each in curve], fmt="o", capsize=2, **style)
    panel.axhline(0.0, color=_EXACT, linestyle=":")
    panel.axvline(judgements[0].cost.exact_pairs, color=_EXACT, linestyle=":")
    panel.set_xscale("log")
    panel.set_yscale("symlog", linthresh=_LINEAR_NATS)
    panel.set_xlabel("pairs a query; dotted: exact attention")
    panel.set_ylabel("nats a byte added, ± standard error over documents")
    panel.set_title("all layers of the model replaced", fontsize=10)
    panel.grid(alpha=0.3, which="both")
