"""The sections of the page of `inspect`: what each map of heads shows, and how to read it."""

from collections.abc import Sequence

from plotly.graph_objects import Figure

from hyperattention.calibration.head_statistics import SINKS, WINDOW, LayerFigures
from hyperattention.report.maps import MapStyle, error_against_time, head_map, method_map
from hyperattention.report.page import Section


def sections(layers: Sequence[LayerFigures], chosen: str) -> list[Section]:
    """Make the sections, in the order of the page.

    Args:
        layers: the figures of each layer.
        chosen: what chose the methods, in words.

    Returns:
        the sections.
    """
    return [*_cost_sections(layers), *_mass_sections(layers), *_row_sections(layers), *_choice_sections(layers, chosen)]


def _draw(layers: Sequence[LayerFigures], name: str, style: MapStyle) -> Figure:
    return head_map(layers, [layer.figures[name] for layer in layers], style)


def _cost_sections(layers: Sequence[LayerFigures]) -> list[Section]:
    """The error and the cost of the chosen method."""
    errors, low, high = ([layer.figures[name] for layer in layers] for name in ("error", "low", "high"))
    intervals = [
        [f"95% interval {a:.3f} to {b:.3f}" for a, b in zip(*pair, strict=True)] for pair in zip(low, high, strict=True)
    ]
    pairs, times = [layer.shares for layer in layers], [layer.time_ms for layer in layers]
    return [
        Section(
            "Error of the chosen method",
            "Mean relative error of output rows, ||out - exact|| / ||exact||. Dark heads have the largest error and need "
            "more keys.",
            head_map(layers, errors, MapStyle("relative error", ".3f", "Reds", least=0.0), intervals),
        ),
        Section(
            "Share of pairs",
            "Query-key pairs listed, relative to exact attention. Dark heads are the most expensive.",
            head_map(layers, pairs, MapStyle("of exact's pairs", ".3f", "Purples", least=0.0)),
        ),
        Section(
            "Time",
            "The time of a call in which the head's method runs all heads of the layer, divided by the number of heads. "
            "Compare with the plot at the end.",
            head_map(layers, times, MapStyle("ms", ".1f", "Greens", least=0.0)),
        ),
    ]


def _mass_sections(layers: Sequence[LayerFigures]) -> list[Section]:
    """The distribution of the attention weight over keys."""
    share = MapStyle("of the weight", least=0.0, most=1.0)
    return [
        Section(
            "Mass on sinks",
            f"Attention weight on the first {SINKS} tokens, mean over rows. Near 1, the head adds almost nothing.",
            _draw(layers, "sinks", share),
        ),
        Section(
            "Mass in the window",
            f"Attention weight on the nearest {WINDOW} tokens. Near 1, a window alone is enough for the head.",
            _draw(layers, "window", share),
        ),
        Section(
            "Far mass",
            "Attention weight on all other tokens, which a method has to find or draw. Dark heads depend on these tokens.",
            _draw(layers, "far", share),
        ),
    ]


def _row_sections(layers: Sequence[LayerFigures]) -> list[Section]:
    """The properties that make a head hard to approximate."""
    return [
        Section(
            "Entropy of rows",
            "Mean entropy, in nats; its exponential is the effective number of keys of a row. Low: the head is sharp, so "
            "find its heavy keys. High: the head is diffuse, so draw keys.",
            _draw(layers, "entropy", MapStyle("nats", ".2f", "Viridis", least=0.0)),
        ),
        Section(
            "Alpha",
            "The number of keys times the largest squared norm of a column of the attention matrix: large if one key, such "
            "as a sink, matters to all queries.",
            _draw(layers, "alpha", MapStyle("alpha", ".1e", "Viridis", logarithmic=True)),
        ),
        Section(
            "Kappa",
            "Largest over smallest row sum outside sinks and window: large if rows differ much in their weight on far keys.",
            _draw(layers, "kappa", MapStyle("kappa", ".1e", "Viridis", logarithmic=True)),
        ),
    ]


def _choice_sections(layers: Sequence[LayerFigures], chosen: str) -> list[Section]:
    """The chosen methods, and all candidates."""
    return [
        Section(
            "Chosen method",
            "The method of each head; query heads of one kv head share a method. Equal colours are equal methods.",
            method_map(layers),
            wide=True,
        ),
        Section(
            "Error against time",
            "Every dot is a candidate that runs all heads; the star is the chosen method of each head. Both are means over "
            "layers; errors are over all rows, of the worst query head of each kv head. Further left and lower is better. "
            "Click a layer in the legend to see only the candidates of that layer.",
            error_against_time(layers, chosen),
            wide=True,
        ),
    ]
