"""Project context parallelism to many GPUs: bytes, and times by bandwidth and latency. All of it is derived, none measured.

    python benchmarks/distributed_model.py --check      # the model's bytes beside the counted ones of the records
    python benchmarks/distributed_model.py              # the table, and docs/distributed.png

The model, for one kv head of width d, R ranks with one chunk of n / R tokens each, M slots a pool, A averages a chunk, H
keys before a chunk, b bytes a number. The busiest rank is the first or the second one. Through them go

    first, received:   (R - 1) (A ((d + 1) b + 4) + 48)                       averages, their totals, replies
    first, sent:       S (2 d b + 4) + H 2 d b + (R - 1) (4 A + 1248)         drawn keys, the halo, sums, counts
    second, received:  the first line for R - 2, and (M + H) 2 d b + 4 M + 4 A + 1248   also a pool and the halo

where S is how many keys it gives to all pools. If all pools took keys from everywhere alike, S were M (1 + 1/2 + ... +
1/(R - 1)); at worst S = M (R - 1). Ring attention and an all-gather move (n - n / R) 2 d b. A time is bytes over bandwidth,
plus the rounds times the latency: 8 rounds of `PooledChunks`, R - 1 of a ring. Arithmetic, which can hide a ring's time, is
left out.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

from distributed import HEAD_DIM, RECORDS
from matplotlib.figure import Figure

from hyperattention.report.picture import save_picture

PICTURE = Path(__file__).parent.parent / "docs" / "distributed.png"
RANKS = (8, 64, 1024)
TOKENS = (10**6, 10**7, 10**8)
ROUNDS = 8


@dataclass(frozen=True)
class Wire:
    """A network: bytes a second that one GPU sends, and seconds that a message takes. Assumed, not measured."""

    bandwidth: float = 50e9
    latency: float = 20e-6


@dataclass(frozen=True)
class Case:
    """One call, for one kv head."""

    tokens: int
    ranks: int
    num: int = 1024
    averages: int = 512
    halo: int = 256
    head_dim: int = HEAD_DIM
    bytes_each: int = 2

    @property
    def key(self) -> int:
        """Bytes of a key and its value."""
        return 2 * self.head_dim * self.bytes_each

    @property
    def received(self) -> int:
        """Bytes that the first rank receives."""
        return (self.ranks - 1) * (self.averages * ((self.head_dim + 1) * self.bytes_each + 4) + 48)

    def sent(self, given: float) -> float:
        """Bytes that the first rank sends, if it gives so many keys to pools."""
        return given * (self.key + 4) + self.halo * self.key + (self.ranks - 1) * (4 * self.averages + 1248)

    @property
    def alike(self) -> float:
        """Keys that the first rank gives if pools take keys from everywhere alike."""
        return self.num * sum(1 / chunk for chunk in range(1, self.ranks))

    @property
    def worst(self) -> float:
        """Keys that the first rank gives if every pool takes its keys from there alone."""
        return self.num * (self.ranks - 1)

    @property
    def ring(self) -> float:
        """Bytes that ring attention, or an all-gather, moves through each rank."""
        return (self.tokens - self.tokens / self.ranks) * self.key

    def most(self, given: float) -> float:
        """Bytes through the busiest rank, sent or received, whichever are more."""
        second = self.received * (self.ranks - 2) / (self.ranks - 1)
        second += (self.num + self.halo) * self.key + 4 * self.num + 4 * self.averages + 1248
        return max(self.received, self.sent(given), second)


def check() -> None:
    """Compare the model with what was counted."""
    for record in map(json.loads, RECORDS.read_text().splitlines()):
        if record["kind"] != "bytes" or record["way"] != "pooled":
            continue
        case = Case(record["tokens"], record["ranks"], record["num"], record["chunk"] // 32)
        first = record["by_purpose"][0]
        given = first["sent"]["pool"] / case.key
        print(
            f"{case.tokens} tokens, {case.ranks} ranks: {record['most']} bytes counted, {case.most(given):.0f} by the model "
            f"for the {given:.0f} keys that the first rank gave,\n  {case.most(case.alike):.0f} if pools took keys from "
            f"everywhere alike, {case.most(case.worst):.0f} at worst; {record['rounds']} rounds counted, {ROUNDS} by the "
            "model"
        )


def table(wire: Wire) -> list[dict[str, float]]:
    """Project every number of ranks and tokens."""
    rows = []
    for ranks in RANKS:
        for tokens in TOKENS:
            case = Case(tokens, ranks, averages=min(512, tokens // ranks // 32))
            alike, worst = case.most(case.alike), case.most(case.worst)
            rows.append(
                {
                    "ranks": ranks, "tokens": tokens, "MB": alike / 1e6, "MB at worst": worst / 1e6,
                    "MB of a ring": case.ring / 1e6,
                    "fewer": case.ring / alike, "fewer at worst": case.ring / worst,
                    "ms": 1e3 * (alike / wire.bandwidth + ROUNDS * wire.latency),
                    "ms of a ring": 1e3 * (case.ring / wire.bandwidth + (ranks - 1) * wire.latency),
                }
            )  # fmt: skip
    return rows


def draw(rows: list[dict[str, float]]) -> None:
    """Plot bytes through the busiest rank against tokens."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    sides = figure.subplots(1, 2)
    for axes, ours, ring, label in ((sides[0], "MB", "MB of a ring", "MB"), (sides[1], "ms", "ms of a ring", "ms")):
        for number, ranks in enumerate(RANKS):
            of_ranks = [row for row in rows if row["ranks"] == ranks]
            tokens = [row["tokens"] for row in of_ranks]
            axes.plot(tokens, [row[ours] for row in of_ranks], f"C{number}o-", label=f"pools, {ranks} GPUs")
            axes.plot(tokens, [row[ring] for row in of_ranks], f"C{number}x--", label=f"ring, {ranks} GPUs")
        axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel=f"{label} a kv head and layer")
    sides[0].set_title("bytes through the busiest rank (derived)")
    sides[1].set_title("time on the wire, 50 GB/s and 20 us (derived)")
    sides[0].legend(fontsize=7)
    save_picture(figure, PICTURE, 110)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare the model's bytes with the counted ones")
    options = parser.parse_args()
    if options.check:
        return check()
    rows = table(Wire())
    print("| " + " | ".join(rows[0]) + " |\n|" + "---|" * len(rows[0]))
    for row in rows:
        print("| " + " | ".join(f"{value:,.0f}" if value >= 10 else f"{value:.2f}" for value in row.values()) + " |")
    draw(rows)


if __name__ == "__main__":
    main()
