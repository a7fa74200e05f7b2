"""Tables of an evaluation: one line for each policy and budget, exact attention first."""

from collections.abc import Sequence

from rich.table import Table

from hyperattention.evaluation.summary import FLOOR, Cell, Continuation


def retrieval_table(cells: Sequence[Cell], title: str) -> Table:
    """Tabulate the answers found at one length, over all depths.

    Args:
        cells: the cells of that length.
        title: model and length.

    Returns:
        the table.
    """
    note = (
        f"95% interval in brackets; h, v: the question was hidden or visible when the cache was compressed; "
        f"in parentheses: beyond\nthe model, because exact attention finds less than {FLOOR:.0%}"
    )
    table = Table(title=title, title_justify="left", caption=note, caption_justify="left")
    whole = [cell for cell in cells if cell.depth is None]
    columns = list(dict.fromkeys((cell.task, cell.visible) for cell in whole))
    table.add_column("policy")
    for task, visible in columns:
        table.add_column(f"{task} {'v' if visible else 'h'}", justify="right")
    table.add_column("cache", justify="right")
    table.add_column("ms a token", justify="right")
    for who in dict.fromkeys(cell.candidate for cell in whole):
        own = {(cell.task, cell.visible): cell for cell in whole if cell.candidate == who}
        some = [cell for cell in own.values() if not cell.beyond] or list(own.values())
        shown = [_format_cell(own[column]) if column in own else "-" for column in columns]
        memory, seconds = (sum(getattr(c, name) for c in some) / len(some) for name in ("memory_bytes", "seconds"))
        style = "dim" if who.family.policy is None else ""
        exact = all(cell.exact for cell in own.values())
        table.add_row(_label(who.name, exact), *shown, f"{memory / 2**20:.2f} MiB", f"{1000 * seconds:.2f}", style=style)
    return table


def continuation_table(losses: Sequence[Continuation], title: str) -> Table:
    """Tabulate the loss that compressed caches add at one length.

    Args:
        losses: the losses of that length.
        title: model and length.

    Returns:
        the table.
    """
    note = "± standard error over texts; loss of the continuation, with teacher forcing, after the beginning was compressed"
    table = Table(title=title, title_justify="left", caption=note, caption_justify="left")
    table.add_column("policy")
    for name in ("nats a token", "added", "texts", "cache"):
        table.add_column(name, justify="right")
    for each in losses:
        spread = "" if each.added.error is None else f" ± {each.added.error:.4f}"
        style = "dim" if each.candidate.family.policy is None else ""
        table.add_row(
            _label(each.candidate.name, each.exact),
            f"{each.added.loss:.4f}",
            f"{each.added.nats:+.4f}{spread}",
            str(each.added.texts),
            f"{each.memory_bytes / 2**20:.2f} MiB",
            style=style,
        )
    return table


def _format_cell(cell: Cell) -> str:
    low, high = cell.share.interval
    text = f"{cell.share.value:.0%} [{low:.0%}, {high:.0%}]".replace("%,", ",").replace("%]", "]")
    return f"({text})" if cell.beyond else text


def _label(name: str, exact: bool) -> str:
    return f"{name} (exact)" if exact and name != "exact" else name
