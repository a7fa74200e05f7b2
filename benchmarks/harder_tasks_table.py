"""The tables of more than one kind of needle, from the records of harder_tasks.py."""

import statistics
from collections.abc import Iterable
from pathlib import Path

RECORDS = Path(__file__).parent / "records" / "harder_tasks.jsonl"
METHODS = ("default", "thorough", "lean", "control")
# of all answers of a group, the share that exact attention has to answer before a method is judged by the others
ENOUGH = 0.6


def tables(records: Iterable[dict]) -> str:
    """Write three tables: answers right by task and group, losses by task, and what the model cannot do."""
    by_task: dict[str, dict[str, list[dict]]] = {}
    for record in records:
        by_task.setdefault(record["task"], {}).setdefault(record["name"], []).append(record)
    judged, dropped, losses = [], [], []
    for task, found in by_task.items():
        exact = found.get("exact", [])
        for group in sorted({group for record in exact for group in record["groups"]}):
            right, asked = _counted(exact, group)
            name = task if group == task else f"{task}: {group}"
            if right < ENOUGH * asked:
                dropped.append(f"| {name} | {asked} | {100 * right / asked:.1f} % |")
                continue
            shares = [_share(found.get(method, []), exact, group) for method in METHODS]
            judged.append(f"| {name} | {asked} | {100 * right / asked:.1f} % | {' | '.join(shares)} |")
        if any(method in found for method in METHODS):
            losses.append(_losses(task, found))
    names = " | ".join(METHODS)
    return "\n".join(
        [
            f"| answers right | answers | exact: the ceiling | {names} |", "|---|---|---|---|---|---|---|", *judged, "",
            f"| added nats a byte of text; a character of the answers (documents x seeds) | {names} |",
            "|---|---|---|---|---|", *losses, "",
            f"| left out: exact attention answers fewer than {ENOUGH:.0%} | answers | exact |", "|---|---|---|", *dropped,
        ]
    )  # fmt: skip


def _counted(records: list[dict], group: str) -> tuple[int, int]:
    right, asked = (sum(record["groups"][group][at] for record in records) for at in (0, 1))
    return right, asked


def _paired(records: list[dict], exact: list[dict]) -> list[tuple[dict, dict]]:
    """Pair each pass with that of exact attention on the same document."""
    by_document = {record["document"]: record for record in exact}
    return [(record, by_document[record["document"]]) for record in records if record["document"] in by_document]


def _share(records: list[dict], exact: list[dict], group: str) -> str:
    pairs = _paired(records, exact)
    if not pairs:
        return ""
    right, asked = _counted([ours for ours, _ in pairs], group)
    before, _ = _counted([theirs for _, theirs in pairs], group)
    # a method that ran on fewer documents says so
    fewer = f", of {asked}" if asked < _counted(exact, group)[1] else ""
    return f"{100 * right / asked:.1f} % ({100 * (right - before) / asked:+.1f}){fewer}"


def _losses(task: str, found: dict[str, list[dict]]) -> str:
    cells = []
    for method in METHODS:
        pairs = _paired(found.get(method, []), found.get("exact", []))
        losses = "; ".join(_added(pairs, name) for name in ("nats_per_byte", "nats_per_character")) if pairs else ""
        documents = {record["document"] for record, _ in pairs}
        cells.append(f"{losses} ({len(documents)} x {len(pairs) // len(documents)})" if pairs else "")
    return f"| {task} | {' | '.join(cells)} |"


def _added(pairs: list[tuple[dict, dict]], name: str) -> str:
    if any(theirs[name] is None for _, theirs in pairs):
        return "no text"
    return f"{statistics.fmean(ours[name] - theirs[name] for ours, theirs in pairs):+.4f}"
