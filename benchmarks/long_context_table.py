"""The table of loss and retrieval on long documents, from the records of long_context.py."""

import statistics
from collections.abc import Iterable
from pathlib import Path

RECORDS = Path(__file__).parent / "records" / "long_context.jsonl"
# the methods of the README's table
NAMES = ("exact", "default", "thorough", "lean", "control", "sinks_window")


def table(records: Iterable[dict]) -> str:
    """Write a table: each method against exact attention on the same documents."""
    by_name: dict[str, list[dict]] = {}
    for record in records:
        by_name.setdefault(record["name"], []).append(record)
    exact = {record["document"]: record for record in by_name.get("exact", [])}
    lines = [
        "| method | documents x seeds | added nats a byte | answers right | points lost | worst of 8 depths | error | "
        "pairs a query | fewer than exact | attention, vs exact |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, found in by_name.items():
        pairs = [(record, exact[record["document"]]) for record in found if record["document"] in exact]
        if pairs:
            lines.append(_line(name, pairs))
    return "\n".join(lines)


def _line(name: str, pairs: list[tuple[dict, dict]]) -> str:
    documents = {ours["document"] for ours, _ in pairs}
    added = [
        statistics.fmean(
            ours["nats_per_byte"] - theirs["nats_per_byte"] for ours, theirs in pairs if ours["document"] == each
        )
        for each in documents
    ]
    spread = f" ± {statistics.stdev(added) / len(added) ** 0.5:.4f}" if len(added) > 1 else ""
    retrieval, before = (statistics.fmean(pair[at]["retrieval"] for pair in pairs) for at in (0, 1))
    num_depths = len(pairs[0][0]["depths"])
    depths = [[sum(pair[at]["depths"][i][j] for pair in pairs) for j in (0, 1)] for i in range(num_depths) for at in (0, 1)]
    shares = [right / asked if asked else float("nan") for right, asked in depths]
    worst = max(theirs - ours for ours, theirs in zip(shares[::2], shares[1::2], strict=True) if ours == ours)
    times = [(ours["attention_seconds"], theirs["attention_seconds"]) for ours, theirs in pairs if ours["attention_seconds"]]
    ratio = f"{statistics.median(theirs / ours for ours, theirs in times):.1f}x" if times else ""
    errors = [ours["error"]["mean"] for ours, _ in pairs if ours["error"]]
    where = f"| {name} | {len(documents)} x {len(pairs) // len(documents)} |"
    if not errors:
        return f"{where} 0 | {100 * retrieval:.1f} % | 0 | 0 | exact | {pairs[0][0]['pairs']:,.0f} | 1x | 1x |"
    return (
        f"{where} {statistics.fmean(added):+.4f}{spread} | {100 * retrieval:.1f} % | {100 * (before - retrieval):.1f} | "
        f"{100 * worst:.1f} | {statistics.fmean(errors):.3f} | {pairs[0][0]['pairs']:,.0f} | "
        f"{1 / pairs[0][0]['share_of_exact']:.1f}x | {ratio} |"
    )
