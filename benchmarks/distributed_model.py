"""Project context parallelism to many GPUs: bytes, and times by bandwidth and latency. All of it is derived.

    python benchmarks/distributed_model.py              # the table, and docs/distributed.png

The model is `distributed_case.py`; `distributed_check.py` compares it with what was counted and measured on small cases, and
the picture shows both.
"""

from pathlib import Path

from distributed_case import Case, Wire
from distributed_check import compared, runs
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hyperattention.report.picture import save_picture

PICTURE = Path(__file__).parent.parent / "docs" / "distributed.png"
RANKS = (8, 64, 1024)
TOKENS = (10**6, 10**7, 10**8)


def table(wire: Wire) -> list[dict[str, float]]:
    """Project every number of ranks and tokens."""
    rows = []
    for ranks in RANKS:
        for tokens in TOKENS:
            case = Case(tokens, ranks, num=min(2048, tokens // ranks), averages=min(2048, tokens // ranks // 8))
            alike, worst = case.most(case.alike), case.most(case.worst)
            rows.append(
                {
                    "ranks": ranks, "tokens": tokens, "MB": alike / 1e6, "MB at worst": worst / 1e6,
                    "MB of a ring": case.moved_by_ring / 1e6,
                    "fewer": case.moved_by_ring / alike, "fewer at worst": case.moved_by_ring / worst,
                    "ms": 1e3 * wire.seconds(case.rounds(case.alike)),
                    "ms at worst": 1e3 * wire.seconds(case.rounds(case.worst)),
                    "ms of a ring": 1e3 * wire.seconds(case.ring),
                    "ms of an all-gather": 1e3 * wire.seconds(case.gather),
                }
            )  # fmt: skip
    return rows


def draw(rows: list[dict[str, float]]) -> None:
    """Plot projected bytes and times against tokens, and predicted times of small cases against measured ones."""
    figure = Figure(figsize=(14, 4), layout="constrained")
    sides = figure.subplots(1, 3)
    for axes, ours, ring, label in ((sides[0], "MB", "MB of a ring", "MB"), (sides[1], "ms", "ms of a ring", "ms")):
        for number, ranks in enumerate(RANKS):
            of_ranks = [row for row in rows if row["ranks"] == ranks]
            tokens = [row["tokens"] for row in of_ranks]
            axes.plot(tokens, [row[ours] for row in of_ranks], f"C{number}o-", label=f"pools, {ranks} GPUs")
            axes.plot(tokens, [row[ring] for row in of_ranks], f"C{number}x--", label=f"ring, {ranks} GPUs")
        axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel=f"{label} a kv head and layer")
    sides[0].set_title("bytes through the busiest rank (derived)")
    sides[1].set_title("time: 50 GB/s, 20 us a round, 1 us a message (derived)", fontsize=10)
    sides[0].legend(fontsize=7)
    draw_check(sides[2])
    save_picture(figure, PICTURE, 110)


def draw_check(axes: Axes) -> None:
    """Plot what `distributed_check.py` prints of times."""
    found = [each for records in runs() for each in compared(records)]
    for number, way in enumerate(("pooled", "ring", "all-gather")):
        for mark, wire in (("o", "loopback"), ("x", "links of 1000 Mbit/s")):
            some = [each for each in found if (each.record["way"], each.record["wire"]) == (way, wire)]
            measured, predicted = (
                [1e3 * value for value in values]
                for values in zip(*((each.record["median_s"], each.seconds) for each in some), strict=True)
            )
            axes.plot(measured, predicted, f"C{number}{mark}", label=f"{way}, {wire}")
    ends = [1, 200]
    axes.plot(ends, ends, "k-", linewidth=0.5)
    axes.set(xscale="log", yscale="log", xlabel="ms, measured", ylabel="ms, predicted")
    axes.set_title("2 and 4 processes, 8k to 32k tokens (measured)")
    axes.legend(fontsize=7)


def main() -> None:
    rows = table(Wire())
    print("| " + " | ".join(rows[0]) + " |\n|" + "---|" * len(rows[0]))
    for row in rows:
        print("| " + " | ".join(f"{value:,.0f}" if value >= 10 else f"{value:.2f}" for value in row.values()) + " |")
    draw(rows)


if __name__ == "__main__":
    main()
