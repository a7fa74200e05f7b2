"""The table of loss and retrieval on long documents, from the records of long_context.py."""

import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

RECORDS = Path(__file__).parent / "records" / "long_context.jsonl"
# the methods of the README's table
NAMES = ("exact", "default", "thorough", "lean", "control", "sinks_window")


@dataclass(frozen=True)
class Added:
    """What a method adds to the loss: its passes, each beside the pass of exact attention over the same document."""

    pairs: list[tuple[dict, dict]]

    @property
    def documents(self) -> list[int]:
        return sorted({ours["document"] for ours, _ in self.pairs})

    @property
    def of_each(self) -> list[float]:
        """Nats a byte, by document."""
        return [
            statistics.fmean(
                ours["nats_per_byte"] - theirs["nats_per_byte"] for ours, theirs in self.pairs if ours["document"] == each
            )
            for each in self.documents
        ]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.of_each)

    @property
    def spread(self) -> str:
        """The standard error over documents, as a text; empty for one document."""
        each = self.of_each
        return f" ± {statistics.stdev(each) / len(each) ** 0.5:.4f}" if len(each) > 1 else ""


def added_by(records: Iterable[dict]) -> dict[str, Added]:
    """Put the passes of every method beside those of exact attention on the same documents."""
    by_name: dict[str, list[dict]] = {}
    for record in records:
        by_name.setdefault(record["name"], []).append(record)
    exact = {record["document"]: record for record in by_name.get("exact", [])}
    beside = {
        name: Added([(record, exact[record["document"]]) for record in found if record["document"] in exact])
        for name, found in by_name.items()
    }
    return {name: added for name, added in beside.items() if added.pairs}


def table(records: Iterable[dict]) -> str:
    """Write a table: each method against exact attention on the same documents."""
    lines = [
        "| method | documents x seeds | added nats a byte | answers right | points lost | worst of 8 depths | error | "
        "pairs a query | fewer than exact | attention, vs exact |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    return "\n".join([*lines, *(_line(name, added) for name, added in added_by(records).items())])


def _line(name: str, added: Added) -> str:
    pairs, documents = added.pairs, added.documents
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
        f"{where} {added.mean:+.4f}{added.spread} | {100 * retrieval:.1f} % | {100 * (before - retrieval):.1f} | "
        f"{100 * worst:.1f} | {statistics.fmean(errors):.3f} | {pairs[0][0]['pairs']:,.0f} | "
        f"{1 / pairs[0][0]['share_of_exact']:.1f}x | {ratio} |"
    )
