"""Tables with one line for each method; the error is always shown beside the time."""

from collections.abc import Sequence

from rich.table import Table

from hyperattention.bench.case import Case
from hyperattention.bench.error import Error
from hyperattention.bench.frontier import Point
from hyperattention.bench.speed import Speed
from hyperattention.bench.timing import Ratio
from hyperattention.methods.base import Cost
from hyperattention.reference.evaluate import ModelJudgement


def format_error(error: Error | None) -> str:
    """Format an error with its interval."""
    return "-" if error is None else f"{error.mean:.3f} [{error.low:.3f}, {error.high:.3f}]"


def format_ratio(ratio: Ratio, *, spread: bool = False) -> str:
    """Format a ratio of speeds: above 1 is faster, below 1 is slower."""
    digits = 1 if ratio.value >= 10 else 2
    text = f"{ratio.value:.{digits}f}x"
    return f"{text} [{ratio.low:.{digits}f}, {ratio.high:.{digits}f}]" if spread else text


def format_seconds(seconds: float) -> str:
    """Format a time in seconds or milliseconds."""
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.0f} ms"


def format_memory(num_bytes: int | None) -> str:
    """Format a size in MiB."""
    return "-" if num_bytes is None else f"{num_bytes / 2**20:.0f} MiB"


def format_added(judgement: ModelJudgement) -> str:
    """Format the added loss, with its standard error over documents."""
    spread = "" if judgement.added_error is None else f" ± {judgement.added_error:.4f}"
    return f"{judgement.added_nats:+.4f}{spread}"


def loss_table(judgements: Sequence[ModelJudgement], title: str) -> Table:
    """Tabulate loss, retrieval and speed of a model with each method.

    Args:
        judgements: one judgement for each row.
        title: the model and the text.

    Returns:
        the table.
    """
    asked = judgements[0].retrieval is not None
    audited = any(each.error is not None for each in judgements)
    table = Table(title=title, title_justify="left", caption=_LOSS_NOTE, caption_justify="left")
    table.add_column("method")
    some = (*(["retrieval"] if asked else []), "pairs/query", *(["error [95%]"] if audited else []))
    for name in ("bits/byte", "added nats/byte", *some):
        table.add_column(name, justify="right")
    for name in ("calls approx.", "attention", "model"):
        table.add_column(name, justify="right")
    for each in judgements:
        retrieval = [f"{each.retrieval:.1%}"] if each.retrieval is not None else []
        error = [format_error(each.error)] if audited else []
        table.add_row(
            each.label,
            f"{each.bits_per_byte:.3f}",
            format_added(each),
            *retrieval,
            _pairs(each.cost),
            *error,
            f"{each.share_of_calls:.0%}",
            format_ratio(each.attention_ratio),
            format_ratio(each.model_ratio),
            style=_style(each.row),
        )
    return table


_LOSS_NOTE = (
    "loss on ordinary text of the second half, ± standard error over documents; error: mean relative L2 error of attention\n"
    "rows, with its interval; last columns: speed relative to exact, of attention alone and of the complete forward pass"
)


def depth_table(judgements: Sequence[ModelJudgement]) -> Table:
    """Tabulate retrieval by the distance of the answer.

    Args:
        judgements: one judgement for each row, with answers.

    Returns:
        the table.
    """
    table = Table(title="retrieval by distance, in tokens", title_justify="left")
    table.add_column("method")
    for depth in judgements[0].depths:
        table.add_column(f"{depth.begin}-{depth.end}", justify="right")
    for each in judgements:
        shares = ("-" if depth.share is None else f"{depth.share:.0%}" for depth in each.depths)
        table.add_row(each.label, *shares, style=_style(each.row))
    table.add_row("answers", *(str(depth.answers) for depth in judgements[0].depths), style="dim")
    return table


def speed_table(speeds: Sequence[Speed], case: Case, title: str) -> Table:
    """Tabulate time and error on one case.

    Args:
        speeds: one measurement for each row.
        case: the inputs.
        title: the title of the table.

    Returns:
        the table.
    """
    table = Table(title=f"{title}: {case.length:,} tokens, {case.title}", title_justify="left")
    table.add_column("method")
    for name in ("time", "vs SDPA [quartiles]", "error [95%]", "pairs/query", "to choose", "peak memory"):
        table.add_column(name, justify="right")
    for each in speeds:
        table.add_row(
            each.label,
            format_seconds(each.timing.median),
            format_ratio(each.ratio, spread=True),
            format_error(each.error),
            _pairs(each.cost),
            f"{each.cost.selection_pairs:,.0f}",
            format_memory(each.memory_bytes),
            style=_style(each.row),
        )
    return table


def frontier_table(points: Sequence[Point], title: str) -> Table:
    """Tabulate time and error of methods at several budgets, and mark the dominated methods.

    Args:
        points: one point for each method and budget, exact attention first.
        title: the inputs of the methods.

    Returns:
        the table, a section for each budget.
    """
    table = Table(title=title, title_justify="left", caption=_FRONTIER_NOTE, caption_justify="left")
    table.add_column("method")
    for name in ("pairs/query", "to choose", "time", "vs exact", "error [95%]", "95th pct.", "norm", "worst head"):
        table.add_column(name, justify="right")
    table.add_column("front")
    slots = points[0].candidate.slots
    for each in points:
        if each.candidate.slots != slots:
            slots = each.candidate.slots
            table.add_section()
        figures = (each.overall("percentile_95_bound"), each.overall("operator_error"), each.worst_head)
        table.add_row(
            each.label,
            _pairs(each.cost),
            f"{each.cost.selection_pairs:,.0f}",
            format_seconds(each.timing.median),
            f"{points[0].timing.median / each.timing.median:.2f}x",
            format_error(each.error),
            *(f"{value:.3f}" for value in figures),
            "front" if each.front else "dominated",
            style=_style(each.candidate.family),
        )
    return table


_FRONTIER_NOTE = (
    "error: mean relative L2 error of attention rows over heads and calls; 95th pct.: with 95% confidence 95% of a head's\n"
    "rows have a smaller error; norm: the error in the paper's norm; front: no other method is both as fast and as accurate"
)


def _pairs(cost: Cost) -> str:
    share = cost.share_of_exact
    return f"{cost.pairs:,.0f}" if share >= 1 else f"{cost.pairs:,.0f} ({1 / share:.1f}x fewer)"


def _style(row: str) -> str:
    # the name of a row may also contain its budget
    return {"default": "bold", "exact": "dim"}.get(row.partition("@")[0], "")
