"""The tables of both kinds of structured heads, from the records of head_kinds.py."""

from pathlib import Path

ROOT = Path(__file__).parents[1]
RECORDS, LONG_RECORDS = (ROOT / "benchmarks" / "records" / f"head_kinds{part}.jsonl" for part in ("", "_long"))


def table(records: list[dict]) -> str:
    """The table of errors in docs/measured.md."""
    lines = [
        "| heads | width | tokens | method | error | control, same slots | ratio | worst head |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for each in (x for x in records if x["part"] == "error"):
        ours, control = each["error"], each["control_error"]
        near = "" if ours["high"] < control["low"] or control["high"] < ours["low"] else ", intervals overlap"
        lines.append(
            f"| {each['heads']} | {each['head_dim']} | {each['length']:,} | {each['row']} | {ours['mean']:.3f} "
            f"| {control['mean']:.3f} | {ratio_text(each['ratio'])}{near} | {ratio_text(max(each['ratio_by_head']))} |"
        )
    return "\n".join(lines)


def ratio_text(ratio: float) -> str:
    return f"{ratio:.2f} (**loses**)" if ratio >= 1 else f"{ratio:.2f}"


def keys_table(records: list[dict]) -> str:
    """The table of keys in docs/measured.md."""
    found = [each for each in records if each["part"] == "keys"]
    names = list(found[0]["quartiles"])
    lines = [f"| keys of | width | tokens | heads | {' | '.join(names)} |", "|" + "---|" * (4 + len(names))]
    for each in found:
        cells = (quartile_text(each["quartiles"][name]) for name in names)
        lines.append(
            f"| {each['of']} | {each['head_dim']} | {each['length']:,} | {each['num_heads']} | {' | '.join(cells)} |"
        )
    return "\n".join(lines)


def quartile_text(quartiles: list[float]) -> str:
    low, middle, high = (f"{x:.0f}" if x > 1 else f"{x:.2f}" for x in quartiles)
    return f"{middle} ({low} to {high})"
