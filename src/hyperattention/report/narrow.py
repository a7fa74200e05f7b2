"""Tables on narrow terminals: a table that is too wide is printed in parts, each with the first column; nothing is cut."""

from dataclasses import replace

from rich.console import Console
from rich.table import Table

# largest width of the first column, which contains words, in a table that is printed in parts
_WORDS = 26


def print_table(console: Console, table: Table) -> None:
    """Print a table in one piece, or in parts if it is wider than the console.

    Args:
        console: the console to print to.
        table: the table; its first column is the name of each row.
    """
    if _width(console, table) <= console.width:
        console.print(table)
        return
    table.columns[0].max_width = _WORDS
    groups: list[list[int]] = [[]]
    for number in range(1, len(table.columns)):
        if groups[-1] and _width(console, _part(table, [*groups[-1], number])) > console.width:
            groups.append([])
        groups[-1].append(number)
    for turn, group in enumerate(groups):
        part = _part(table, group)
        part.title, part.caption = table.title if turn == 0 else None, table.caption if turn == len(groups) - 1 else None
        console.print(part)


def _width(console: Console, table: Table) -> int:
    return console.measure(table, options=console.options.update(max_width=10_000)).maximum


def _part(table: Table, group: list[int]) -> Table:
    part = Table(title_justify="left", caption_justify="left")
    part.columns = [replace(table.columns[number], _index=turn) for turn, number in enumerate((0, *group))]
    part.rows = table.rows
    return part
