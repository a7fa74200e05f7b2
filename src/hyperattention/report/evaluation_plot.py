"""Heat maps of an evaluation: depth against length, with a panel for each task and for hidden and visible questions."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hyperattention.evaluation.summary import Cell
from hyperattention.report.picture import save_picture

# the smallest height and width of a panel, in inches
_PANEL = 2.4


def plot_heat_map(path: Path, cells: Sequence[Cell], depths: int) -> None:
    """Draw the share of answers that one candidate found; cells that exact attention fails too are grey.

    Args:
        path: the PNG file, which is replaced.
        cells: the cells of the candidate.
        depths: number of ranges of depth.
    """
    tasks, lengths, seen = (sorted({getattr(cell, name) for cell in cells}) for name in ("task", "length", "visible"))
    figure = Figure(figsize=(1 + _PANEL * len(tasks), 1 + 1.2 * _PANEL * len(seen)), layout="constrained")
    grid = figure.subplots(len(seen), len(tasks), squeeze=False, sharex=True, sharey=True)
    for row, visible in enumerate(seen):
        for column, task in enumerate(tasks):
            axes, own = grid[row, column], [c for c in cells if (c.task, c.visible) == (task, visible)]
            _draw(axes, own, lengths, depths)
            axes.set_title(f"{task}, question {'visible' if visible else 'hidden'}", fontsize=8)
            axes.set_xlabel("tokens" if row == len(seen) - 1 else "")
            axes.set_ylabel("depth" if column == 0 else "")
    figure.suptitle(f"{cells[0].candidate.name}: share of answers found (grey: beyond the model)", fontsize=10)
    save_picture(figure, path, 110)


def _draw(axes: Axes, cells: Sequence[Cell], lengths: Sequence[int], depths: int) -> None:
    values = [[float("nan")] * len(lengths) for _ in range(depths)]
    for cell in cells:
        if cell.depth is not None:
            column = lengths.index(cell.length)
            if not cell.beyond:
                values[cell.depth][column] = cell.share.value
            axes.text(column, cell.depth, f"{cell.share.value:.0%}", ha="center", va="center", fontsize=7)
    axes.set_facecolor("0.85")
    axes.imshow(values, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
    axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], fontsize=7)
    axes.set_yticks(range(depths), [f"{number / depths:.0%}" for number in range(depths)], fontsize=7)
