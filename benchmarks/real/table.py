"""The table of what was measured on SmolLM2: all numbers of docs/models.md about it come from the records."""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
RECORDS = ROOT / "benchmarks" / "records" / "real_model.jsonl"
TIMES = RECORDS.with_name("real_times.jsonl")
FIGURES = RECORDS.with_name("real_figures.jsonl")
PAGE = ROOT / "docs" / "models.md"
BEGIN, END = "<!-- real model: written by benchmarks/real/judge.py -->\n", "<!-- real model end -->\n"
LABELS = {
    "exact": "exact",
    "default": "`default_method`",
    "thorough": "`thorough_method`",
    "lean": "`lean_method`, below 131,072 keys",
    "lean_long": "`lean_method`, longer",
    "scan": "every key, by averages of two",
    "control": "control: sinks, window and uniform draws, slots of lean",
    "sinks_window": "sinks and window alone",
    "published": "`HyperAttention()`, as published",
    "alike_16": "352 draws for lists of 16 in every head",
    # a plan is named by its tolerance, which says little of a plan for a number of pairs
    "plan_0.121": "plan, 500 pairs",
}


def read(path: Path = RECORDS) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def label_of(name: str) -> str:
    return LABELS.get(name, f"plan, tolerance {name.removeprefix('plan_')}")


def speeds_of(times: Sequence[dict], length: int) -> dict[str, float]:
    """How many times less processor time a method's attention takes than exact attention's, over the timed layers."""
    layers = [record["seconds"] for record in times if record["length"] == length]
    names = {name for seconds in layers for name in seconds}
    taken = {
        name: [(seconds["exact"], seconds[name]) for seconds in layers if name in seconds and "exact" in seconds]
        for name in names
    }
    return {
        name: sum(statistics.median(exact["processor"]) for exact, _ in pairs)
        / sum(statistics.median(ours["processor"]) for _, ours in pairs)
        for name, pairs in taken.items()
        if pairs
    }


def table(records: Sequence[dict], times: Sequence[dict] = ()) -> str:
    """One table for each model and length, each method against exact attention on the same documents."""
    groups: dict[tuple[str, int], list[dict]] = {}
    for record in records:
        groups.setdefault((record["model"], record["length"]), []).append(record)
    return "\n".join(
        _one_table(model, length, read_by_all(found), speeds_of(times, length)) for (model, length), found in groups.items()
    )


def read_by_all(records: Sequence[dict]) -> list[dict]:
    """Records of the documents that every method has read: documents differ by more than methods do."""
    names = {record["name"] for record in records}
    by_sample: dict[str, set[str]] = {}
    for record in records:
        by_sample.setdefault(record["sample"], set()).add(record["name"])
    return [record for record in records if by_sample[record["sample"]] == names]


def _one_table(model: str, length: int, records: Sequence[dict], speeds: dict[str, float]) -> str:
    exact = {record["sample"]: record for record in records if record["name"] == "exact"}
    texts = sorted({record["text"] for record in records}, reverse=True)
    heads = [
        "method",
        *(f"{text}: added nats a token (documents)" for text in texts),
        "error",
        "pairs a query",
        "products to choose them",
        "speed",
    ]
    lines = [f"{model}, {length:,} tokens. {_exact_loss(exact, texts)}", ""]
    lines += [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for name in dict.fromkeys(record["name"] for record in records if record["name"] != "exact"):
        pairs = [(each, exact[each["sample"]]) for each in records if each["name"] == name and each["sample"] in exact]
        if pairs:
            cells = [_added([pair for pair in pairs if pair[0]["text"] == text]) for text in texts]
            lines.append(f"| {' | '.join([label_of(name), *cells, *_rest(pairs, speeds.get(name))])} |")
    return "\n".join([*lines, "", *_where(records)]) + "\n"


# what the README shows of them
BRIEF = ("default", "thorough", "alike_16", "plan_0.121", "lean", "control", "published")


def brief_table(records: Sequence[dict]) -> str:
    """The README's table: added nats and pairs of a few methods, on the documents that every method has read."""
    found = read_by_all(records)
    exact = {record["sample"]: record for record in found if record["name"] == "exact"}
    texts = sorted({record["text"] for record in found}, reverse=True)
    heads = ["method", *(f"added nats a token, {text}" for text in texts), "pairs a query", "fewer than exact"]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for name in BRIEF:
        pairs = [(each, exact[each["sample"]]) for each in found if each["name"] == name]
        if pairs:
            cells = [_added([pair for pair in pairs if pair[0]["text"] == text]) for text in texts]
            (ours, theirs), *_ = pairs
            listed = [f"{ours['pairs']:,.0f}", f"{theirs['pairs'] / ours['pairs']:.1f}x"]
            lines.append(f"| {' | '.join([label_of(name), *cells, *listed])} |")
    return "\n".join(lines)


def _exact_loss(exact: dict[str, dict], texts: Sequence[str]) -> str:
    losses = {text: [each["nats_per_token"] for each in exact.values() if each["text"] == text] for text in texts}
    return "Exact attention: " + ", ".join(
        f"{statistics.fmean(found):.4f} nats a token of {text} ({len(found)})" for text, found in losses.items() if found
    )


def added_of(pairs: Sequence[tuple[dict, dict]]) -> tuple[float, float]:
    """The added nats a token, and the larger of two standard errors: over documents, and over pieces of documents."""
    documents = [ours["nats_per_token"] - theirs["nats_per_token"] for ours, theirs in pairs]
    each = [ours["tokens"] / len(ours["nats"]) for ours, _ in pairs]
    pieces = [
        (more - less) / size
        for (ours, theirs), size in zip(pairs, each, strict=True)
        for more, less in zip(ours["nats"], theirs["nats"], strict=True)
    ]
    errors = [statistics.stdev(found) / len(found) ** 0.5 for found in (documents, pieces) if len(found) > 1]
    return statistics.fmean(documents), max(errors, default=float("nan"))


def _added(pairs: Sequence[tuple[dict, dict]]) -> str:
    if not pairs:
        return "not measured"
    added, error = added_of(pairs)
    return f"{added:+.4f} ± {error:.4f} ({len(pairs)})"


def _rest(pairs: Sequence[tuple[dict, dict]], speed: float | None) -> list[str]:
    errors = [ours["error"]["mean"] for ours, _ in pairs if ours["error"]]
    return [
        f"{statistics.fmean(errors):.3f}" if errors else "not audited",
        f"{pairs[0][0]['pairs']:,.0f}",
        f"{pairs[0][0]['selection_pairs']:,.0f}",
        "not timed" if speed is None else f"{speed:.2f}x",
    ]


def _where(records: Sequence[dict]) -> list[str]:
    places: dict[str, list[str]] = {}
    for record in records:
        versions = record["versions"]
        place = (
            f"{record['device']}, threads: {record['threads']}, torch {versions['torch']}, "
            f"transformers {versions['transformers']}, Python {versions['python']}"
        )
        commit, _, changed = (record["commit"] or "none").partition("+")
        places.setdefault(place, []).append(f"{commit[:10]}{' with changes' if changed else ''}")
    return [f"Measured on {place}; commits {', '.join(dict.fromkeys(commits))}." for place, commits in places.items()]


def write_page(records: Sequence[dict], times: Sequence[dict], page: Path = PAGE) -> None:
    text = page.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise SystemExit(f"{page} must contain these two lines once, in this order:\n{BEGIN}{END}")
    before, _, rest = text.partition(BEGIN)
    page.write_text(before + BEGIN + table(records, times) + END + rest.partition(END)[2])


def figures(records: Sequence[dict], times: Sequence[dict] = ()) -> list[dict]:
    """One line for README's table a method, from the longest documents alone: no bar was set, so none is claimed."""
    length = max(record["length"] for record in records)
    records = read_by_all([record for record in records if record["length"] == length])
    exact = {record["sample"]: record for record in records if record["name"] == "exact"}
    names = dict.fromkeys(record["name"] for record in records if record["name"] != "exact")
    found = {}
    for name in names:
        pairs = [(each, exact[each["sample"]]) for each in records if each["name"] == name and each["sample"] in exact]
        if pairs:
            found[name] = pairs
    speeds = speeds_of(times, length)
    return [_figure(name, length, pairs, speeds.get(name)) for name, pairs in found.items()]


def _figure(name: str, length: int, pairs: Sequence[tuple[dict, dict]], speed: float | None) -> dict:
    texts = sorted({ours["text"] for ours, _ in pairs}, reverse=True)
    by_text = {text: [pair for pair in pairs if pair[0]["text"] == text] for text in texts}
    added = {text: added_of(found) for text, found in by_text.items()}
    shown = ", ".join(f"{text} {value:+.4f} ± {spread:.4f}" for text, (value, spread) in added.items())
    documents = ", ".join(f"{len(found)} of {text}" for text, found in by_text.items())
    error, listed, chosen, ratio = _rest(pairs, speed)
    last = pairs[-1][0]
    fewer = f"{listed} pairs a query ({1 / last['share_of_exact']:.1f}x fewer than exact), {chosen} products to choose them"
    claim = f"added loss on SmolLM2-135M-Instruct, all layers replaced, {length:,} tokens, {label_of(name)}"
    beside = f"error {error}; {fewer}; attention {ratio} as fast as exact; documents: {documents}"
    value = statistics.fmean(value for value, _ in added.values())
    told = {"claim": claim, "bar": "none", "met": True, "value": value, "shown": f"{shown} nats a token", "beside": beside}
    where = {key: last[key] for key in ("commit", "versions", "platform", "device", "cores", "threads")}
    return {"kind": "real_figures", "part": "figure"} | told | where


def write_figures(records: Sequence[dict], times: Sequence[dict], path: Path = FIGURES) -> None:
    path.write_text("".join(json.dumps(each) + "\n" for each in figures(records, times)))
