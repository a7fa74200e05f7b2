"""Maps of layers x heads, and error against time, as plotly figures."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from plotly.graph_objects import Figure, Heatmap, Scatter

from hyperattention.calibration.head_statistics import LayerFigures
from hyperattention.methods.base import AttentionMethod
from hyperattention.methods.method import Method
from hyperattention.report.method_names import short_name
from hyperattention.select.draw import Draw

# with more cells than this, numbers would not fit into the cells; the pointer still shows them
_LABELLED_CELLS = 160
_CELL_HEIGHT, _LEAST_HEIGHT, _FRAME_HEIGHT = 26, 150, 90
_FONT = {"size": 12, "color": "#1b1f24"}
_COLOURS = ("#0969da", "#bc4c00", "#8250df", "#1a7f37", "#bf3989", "#57606a")


@dataclass(frozen=True)
class MapStyle:
    """The format of the numbers of a map.

    Args:
        unit: the unit, for the colour bar and the pointer.
        digits: a format such as ``.2f``.
        colours: a colour scale of plotly.
        logarithmic: whether colours follow the logarithm.
        least: the number of the first colour; None for the smallest number of the map.
        most: the number of the last colour; None for the largest number of the map.
    """

    unit: str
    digits: str = ".2f"
    colours: str = "Blues"
    logarithmic: bool = False
    least: float | None = None
    most: float | None = None


def head_map(
    layers: Sequence[LayerFigures],
    numbers: Sequence[Sequence[float]],
    style: MapStyle,
    details: Sequence[Sequence[str]] | None = None,
) -> Figure:
    """Draw a map with one row for each layer and one column for each query head.

    Args:
        layers: the layers, in order.
        numbers: for each layer, one number for each query head.
        style: the format of the numbers.
        details: for each layer and query head, a text that the pointer shows beside the number; None for no text.

    Returns:
        the figure.
    """
    colour = [[math.log10(x) if style.logarithmic and x > 0 else x for x in row] for row in numbers]
    text = [[_show(x, style.digits) for x in row] for row in numbers]
    few = sum(map(len, numbers)) <= _LABELLED_CELLS
    bar: dict[str, object] = {"title": {"text": style.unit, "side": "right"}, "thickness": 12, "len": 1.0}
    if style.logarithmic:
        bar |= _log_ticks([x for row in colour for x in row])
    drawn = Heatmap(
        z=colour,
        x=_heads(numbers),
        y=[str(layer.layer) for layer in layers],
        text=text,
        colorscale=style.colours,
        texttemplate="%{text}" if few else None,
        zmin=style.least,
        zmax=style.most,
        colorbar=bar,
        xgap=1,
        ygap=1,
        customdata=[[f"<br>{each}" for each in row] for row in details] if details else [[""] * len(row) for row in text],
        hovertemplate=f"layer %{{y}}, head %{{x}}<br>%{{text}} {style.unit}%{{customdata}}<extra></extra>",
    )
    return _framed(Figure(drawn), len(layers))


def _log_ticks(exponents: Sequence[float]) -> dict[str, object]:
    """Label integer powers of ten if there are several, otherwise both ends."""
    finite = [x for x in exponents if math.isfinite(x)] or [0.0]
    least, most = min(finite), max(finite)
    step = max(1, round((most - least) / 5))
    ticks: list[float] = [float(power) for power in range(math.ceil(least), math.floor(most) + 1, step)]
    ticks = ticks if len(ticks) > 1 else [least, most]
    return {"tickvals": ticks, "ticktext": [format(10**power, ".2g") for power in ticks]}


def method_map(layers: Sequence[LayerFigures]) -> Figure:
    """Draw the method of each head, with one colour for each method.

    Args:
        layers: the layers, in order.

    Returns:
        the figure.
    """
    served = [[method for method in layer.methods for _ in range(layer.group)] for layer in layers]
    methods = list(dict.fromkeys(method for row in served for method in row))
    codes = [[methods.index(method) for method in row] for row in served]
    text = [[short_name(method) for method in row] for row in served]
    steps = [(place / len(methods), (place + 1) / len(methods)) for place in range(len(methods))]
    scale = [[edge, _COLOURS[place % len(_COLOURS)]] for place, edges in enumerate(steps) for edge in edges]
    few = max(map(len, served)) <= 8
    drawn = Heatmap(
        z=codes,
        x=_heads(served),
        y=[str(layer.layer) for layer in layers],
        text=text,
        colorscale=scale,
        showscale=False,
        zmin=-0.5,
        zmax=len(methods) - 0.5,
        texttemplate="%{text}" if few else None,
        textfont={"color": "white"},
        xgap=1,
        ygap=1,
        hovertemplate="layer %{y}, head %{x}<br>%{text}<extra></extra>",
    )
    return _framed(Figure(drawn), len(layers))


def error_against_time(layers: Sequence[LayerFigures], chosen: str) -> Figure:
    """Draw error against time of every candidate and of the chosen methods: means over layers, single layers on demand.

    Both were measured in the same way: in one call a layer, with all heads; the error is over all rows, of the worst query
    head of each kv head.

    Args:
        layers: the layers, in order.
        chosen: the label of the chosen methods.

    Returns:
        the figure.
    """
    figure = Figure()
    ladder = [method for method in layers[0].ladder if all(method in layer.ladder for layer in layers)]
    for name in dict.fromkeys(map(_family, ladder)):
        members = [method for method in ladder if _family(method) == name]
        _add_points(figure, layers, members, name, shown=True)
    for layer in layers:
        _add_points(figure, [layer], ladder, f"layer {layer.layer} alone", shown=False)
    # the chosen method of a layer comes after its candidates
    time, error = _mean_point(layers, [len(layer.ladder) for layer in layers])
    star = {"symbol": "star", "size": 16, "color": "#cf222e"}
    figure.add_trace(
        Scatter(
            x=[time],
            y=[error],
            name=chosen,
            mode="markers",
            marker=star,
            text=[chosen],
            hovertemplate=_HOVER,
        )
    )
    figure.update_xaxes(title="milliseconds of one layer's attention", type="log", dtick="D2", tickformat="~g")
    figure.update_yaxes(title="mean relative error", rangemode="tozero")
    figure.update_layout(height=440, margin={"l": 60, "r": 10, "t": 10, "b": 50}, font=_FONT, template="plotly_white")
    return figure


_HOVER = "%{text}<br>%{x:.1f} ms, error %{y:.4f}<extra></extra>"


def _add_points(
    figure: Figure, layers: Sequence[LayerFigures], methods: Sequence[AttentionMethod], name: str, *, shown: bool
) -> None:
    points = []
    for method in methods:
        time, error = _mean_point(layers, [layer.ladder.index(method) for layer in layers])
        points.append((time, error, short_name(method)))
    x, y, text = zip(*sorted(points), strict=True)
    visible = True if shown else "legendonly"
    mode = "lines+markers" if shown else "markers"
    marker = {"size": 8}
    figure.add_trace(
        Scatter(
            x=x, y=y, text=text, name=name, mode=mode, visible=visible, marker=marker, cliponaxis=False, hovertemplate=_HOVER
        )
    )


def _mean_point(layers: Sequence[LayerFigures], places: Sequence[int]) -> tuple[float, float]:
    """Average the measurements at one place of each layer: milliseconds, and errors of kv heads."""
    found = [(layer.measured, place) for layer, place in zip(layers, places, strict=True)]
    time = sum(measured.seconds[place] for measured, place in found) / len(found)
    errors = [error for measured, place in found for error in measured.errors[place]]
    return 1000 * time, sum(errors) / len(errors)


def _family(method: AttentionMethod) -> str:
    if not isinstance(method, Method):
        return short_name(method)
    draws = [type(stage.by).__name__ for stage in method.stages if isinstance(stage, Draw)]
    return f"draws by {draws[0]}" if draws else "sinks + window"


def _heads(rows: Sequence[Sequence[object]]) -> list[str]:
    return [str(head) for head in range(max(map(len, rows)))]


def _show(number: float, digits: str) -> str:
    return "-" if math.isnan(number) else format(number, digits)


def _framed(figure: Figure, rows: int) -> Figure:
    """Add the axes of a map: the first layer at the top, as a model runs them."""
    figure.update_xaxes(title="query head", type="category", showgrid=False)
    figure.update_yaxes(title="layer", type="category", autorange="reversed", showgrid=False)
    height = max(_LEAST_HEIGHT, _CELL_HEIGHT * rows) + _FRAME_HEIGHT
    figure.update_layout(height=height, margin={"l": 50, "r": 10, "t": 8, "b": 45}, font=_FONT, template="plotly_white")
    return figure
