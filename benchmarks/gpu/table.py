"""Tables and a plot from GPU records: no number is typed. Needs nothing but Python; matplotlib only for the plot."""

from collections.abc import Mapping
from pathlib import Path

from gpu.bars import Records, bars, error_text


def plain_table(records: Records) -> str:
    """The bars as text for a terminal."""
    rows = [(bar.figure, bar.bar, bar.shown, bar.verdict.strip("*"), bar.beside) for bar in bars(records)]
    head = ("figure", "bar", "measured", "verdict")
    widths = [max(len(head[i]), *(len(row[i]) for row in rows)) for i in range(4)]
    lines = ["  ".join(head[i].ljust(widths[i]) for i in range(4))]
    for row in rows:
        lines.append("  ".join(row[i].ljust(widths[i]) for i in range(4)).rstrip())
        if row[4]:
            lines.append(f"    {row[4]}")
    return "\n".join(lines)


def gpu_table(records: Records) -> str:
    """The bars, then every comparison, as Markdown; without records every bar says that it is not measured."""
    real = [record for record in records if not record.get("toy")]
    lines = ["| figure | bar | measured | verdict | beside it |", "|---|---|---|---|---|"]
    lines += [f"| {bar.figure} | {bar.bar} | {bar.shown} | {bar.verdict} | {bar.beside} |" for bar in bars(real)]
    if compared := latest(real):
        lines += ["", *comparison_table(compared)]
    if missing := [record for record in real if record.get("skipped") or record.get("failed")]:
        lines += ["", *(f"- {each['part']}: {each.get('skipped') or each.get('failed')}" for each in missing)]
    return "\n".join([*lines, *(["", *places(real)] if real else [])])


def latest(records: Records) -> list[Mapping]:
    """Comparisons in order, a later one in place of an earlier one of the same shape and inputs."""
    found: dict[tuple, Mapping] = {}
    for record in records:
        if record.get("contenders"):
            found[record["part"], record["inputs"], *record["shape"].items()] = record
    return list(found.values())


def comparison_table(records: Records) -> list[str]:
    lines = [
        "| task | inputs | keys | heads | candidate | median ms [quartiles] | vs exact | error | share of pairs "
        "| peak MiB | over floor |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for record in records:
        for each in record["contenders"]:
            cells = [f"{record['part']}: {record['shape']['title']}", record["inputs"], f"{record['shape']['keys']:,}"]
            cells += [f"{record['shape']['heads']}", *candidate_cells(each)]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def candidate_cells(each: Mapping) -> list[str]:
    if each.get("failed"):
        return [each["label"], f"failed: {each['failed'][:80].replace('|', '/')}", *["-"] * 5]
    low, high = (1000 * x for x in each["quartiles_s"])
    return [
        each["label"],
        f"{1000 * each['median_s']:.3g} [{low:.3g}, {high:.3g}]",
        f"{each['speedup']['value']:.3g}x" if each["speedup"] else "-",
        error_text(each),
        f"{each['share_of_exact_pairs']:.3g}",
        f"{each['peak_memory_bytes'] / 2**20:,.0f}" if each["peak_memory_bytes"] is not None else "-",
        f"{each['over_floor']:.3g}x" if each["over_floor"] else "-",
    ]


def places(records: Records) -> list[str]:
    """Say where it was measured, once for each machine and version that took part."""
    found: dict[str, list[str]] = {}
    for record in records:
        versions = record["versions"]
        names = ("torch", "triton", "cuda")
        place = ", ".join([record["device"], *(f"{name} {versions[name]}" for name in names if versions.get(name))])
        found.setdefault(place, []).append(str(record["commit"])[:10] + ("+changes" if "+" in str(record["commit"]) else ""))
    return [f"Measured on {place}; commits {', '.join(dict.fromkeys(commits))}." for place, commits in found.items()]


def plot_gpu(path: Path, records: Records) -> bool:
    """Plot error against time of the longest comparisons, where matplotlib is there; tell whether it was."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    wanted = [record for record in latest([each for each in records if not each.get("toy")]) if record["part"] == "forward"]
    if not wanted:
        return False
    figure = Figure(figsize=(5 * min(2, len(wanted)), 4 * -(-len(wanted) // 2)), layout="constrained")
    for axes, record in zip(
        figure.subplots(-(-len(wanted) // 2), min(2, len(wanted)), squeeze=False).flat, wanted, strict=False
    ):
        for each in record["contenders"]:
            if each.get("failed") or not each["error"]:
                continue
            error = each["error"]
            spread = [[error["mean"] - error["low"]], [error["high"] - error["mean"]]]
            axes.errorbar([1000 * each["median_s"]], [error["mean"]], yerr=spread, fmt="o", capsize=4, label=each["label"])
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("milliseconds")
        axes.set_ylabel("mean relative error, 95% interval")
        axes.set_title(f"{record['shape']['title']}, {record['shape']['keys']:,} tokens, {record['inputs']}", fontsize=9)
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize=7)
    figure.savefig(path, dpi=110)
    return True
