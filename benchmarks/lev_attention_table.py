"""The tables of LevAttention in docs/relatives.md, from the records of lev_attention.py."""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "relatives.md"
# by the images
MARKS = {
    "digits": ("<!-- lev attention: begin (benchmarks/lev_attention.py) -->", "<!-- lev attention: end -->"),
    "mnist": ("<!-- lev attention, mnist: begin (benchmarks/lev_attention.py) -->", "<!-- lev attention, mnist: end -->"),
}
_FILES = {"digits": "lev_attention.jsonl", "mnist": "lev_attention_mnist.jsonl"}
RECORDS = {images: Path(__file__).parent / "records" / name for images, name in _FILES.items()}
# 97.5 % quantiles of Student's distribution, by the number of seeds
STUDENT = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
TOP, RANDOM = "softmax over top leverage", "softmax over random keys"


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half of its 95 % interval over seeds."""
    if len(values) < 2:
        return values[0], float("inf")
    return statistics.fmean(values), STUDENT[len(values)] * statistics.stdev(values) / len(values) ** 0.5


def table(records: list[dict]) -> str:
    """The table of docs/relatives.md: accuracy, and the share of full attention's accuracy at the same seed."""
    by_row: dict[tuple[str, str], dict[int, dict]] = {}
    for record in records:
        by_row.setdefault((record["attention"], record["weights_of"]), {})[record["seed"]] = record
    full = by_row["softmax", "softmax"]
    lines = ["| attention | weights | seeds | keys a query | accuracy | kept of softmax's |", "|---|---|---|---|---|---|"]
    kept: dict[tuple[str, str], tuple[float, float]] = {}
    for row, runs in by_row.items():
        shares = [each["accuracy"] / full[seed]["accuracy"] for seed, each in runs.items()]
        (mean, half), kept[row] = interval([each["accuracy"] for each in runs.values()]), interval(shares)
        one = next(iter(runs.values()))
        keys = one["tokens"] if one["share_of_pairs"] == 1 else one["keys"]
        weights = "trained with it" if row[0] == row[1] else f"of {row[1]}"
        lines.append(
            f"| {row[0]} | {weights} | {len(runs)} | {keys} of {one['tokens']} | {100 * mean:.1f} ± {100 * half:.1f} % | "
            f"{100 * kept[row][0]:.1f} ± {100 * kept[row][1]:.1f} % |"
        )
    ours, random = by_row[TOP, TOP], by_row[RANDOM, RANDOM]
    ahead = [ours[seed]["accuracy"] - random[seed]["accuracy"] for seed in sorted(ours.keys() & random.keys())]
    one = records[0]
    commits = ", ".join(dict.fromkeys(record["commit"][:10] for record in records if record["commit"]))
    about = (
        f"{one['test_images']} test images a seed, {one['plan']['epochs']} epochs; means with 95 % "
        f"intervals over seeds; one CPU thread, torch {one['versions']['torch']}; commits {commits}."
    )
    return "\n".join([*lines, "", *verdicts(kept, interval(ahead)), "", about])


def verdicts(kept: dict[tuple[str, str], tuple[float, float]], ahead: tuple[float, float]) -> list[str]:
    """Say whether the paper's pattern holds: trained keeps more than 90 %, dropped in keeps less than two thirds.

    In the paper dropped-in LevAttention kept 1 % to 62 % of softmax's accuracy, by the model, as remembered.
    """
    (trained, t), (dropped, d) = kept[TOP, TOP], kept[TOP, "softmax"]
    said = []
    for claim, value, half, low, high in (
        ("top leverage, trained, keeps more than 90 % of softmax's accuracy", trained, t, 0.9, float("inf")),
        ("top leverage, dropped into softmax's weights, collapses: it keeps less than two thirds", dropped, d, 0.0, 2 / 3),
    ):
        within, outside = low < value - half and value + half < high, value + half < low or value - half > high
        verdict = "reproduced" if within else "refuted here" if outside else "undecided: the interval holds the bar"
        said.append(f"- {claim}: **{verdict}** ({100 * value:.1f} ± {100 * half:.1f} %).")
    mean, half = ahead
    verdict = "true here" if mean > half else "refuted here" if mean < -half else "undecided: the interval holds 0"
    beats = "top leverage, trained, is more accurate than as many random keys, trained"
    return [*said, f"- {beats}: **{verdict}** ({100 * mean:+.1f} ± {100 * half:.1f} points at equal seeds)."]


def write() -> None:
    """Write the tables of all images that have records into the page."""
    text = PAGE.read_text()
    for images, (begin, end) in MARKS.items():
        if not RECORDS[images].exists():
            continue
        if text.count(begin) != 1 or text.count(end) != 1:
            raise SystemExit(f"{PAGE.name} must contain these two lines once:\n{begin}\n{end}")
        head, rest = text.split(begin)
        text = f"{head}{begin}\n{table(read(RECORDS[images]))}\n{end}{rest.split(end)[1]}"
    PAGE.write_text(text)
