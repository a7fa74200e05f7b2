"""Project context parallelism to many GPUs: bytes, and times by bandwidth and latency; and check both on small cases.

    python benchmarks/distributed_model.py --check      # bytes beside counted ones, times beside measured ones
    python benchmarks/distributed_model.py              # the table, and docs/distributed.png; all of it is derived

The model, for one kv head of width d, R ranks with one chunk of n / R tokens each, M slots a pool, A averages a chunk, H
keys before a chunk, b bytes a number. The busiest rank is the first or the second one. Through them go, besides 16 bytes for
the seal of every message,

    first, received:   (R - 1) (A ((d + 1) b + 4) + 48 + 832)                 averages, their totals, replies, headers
    first, sent:       S (2 d b + 4) + H 2 d b + (R - 1) (4 A + 1248 + 832)   drawn keys, the halo, sums, counts, headers
    second, received:  the first line for R - 2, a header, and (M + H) 2 d b + 4 M + 4 A + 1248     also a pool and the halo

where S is how many keys it gives to all pools. If all pools took keys from everywhere alike, S were M (1 + 1/2 + ... +
1/(R - 1)); at worst S = M (R - 1). Ring attention and an all-gather move (n - n / R) 2 d b.

Rounds follow one another, so each takes the time of its own busiest rank:

    seconds = sum over rounds of  latency + message * messages + max(busiest / link, all / shared)

The link is what one rank sends, or receives, in a second; `shared` is what all ranks together move, if they share cores or a
bus. `--check` fits latency and bandwidth to rounds of plain patterns, and predicts the ways from them. Arithmetic, which can
hide a ring's time, is left out, and so is what the host plans.
"""

import argparse
import itertools
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from distributed import HEAD_DIM, RECORDS
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hyperattention.distributed.seal import SIZE
from hyperattention.report.picture import save_picture

PICTURE = Path(__file__).parent.parent / "docs" / "distributed.png"
RANKS = (8, 64, 1024)
TOKENS = (10**6, 10**7, 10**8)
HEADER, COUNTS, REPLY = 832 + SIZE, 1248 + SIZE, 48 + SIZE


@dataclass(frozen=True)
class Round:
    """One exchange of all ranks.

    Args:
        purpose: what moves.
        busiest: bytes that the busiest rank sends, or receives.
        everyone: bytes that all ranks send together.
        messages: messages with content that the busiest rank sends, or receives.
        both_ways: whether two ranks send to each other.
    """

    purpose: str
    busiest: float
    everyone: float
    messages: int
    both_ways: bool = False


@dataclass(frozen=True)
class Wire:
    """A network. The default is assumed, for GPUs; `fitted` measures one.

    Args:
        latency: seconds of a round.
        message: seconds more for every message of a rank.
        link: bytes a second that a rank sends, and at the same time receives.
        both_ways: the same where two ranks send to each other; the TCP connection of a pair of ranks halves it.
        shared: bytes a second of all ranks together.
    """

    latency: float = 20e-6
    message: float = 1e-6
    link: float = 50e9
    both_ways: float = 50e9
    shared: float = math.inf

    def seconds(self, rounds: Iterable[Round]) -> float:
        return sum(
            self.latency
            + self.message * each.messages
            + max(each.busiest / (self.both_ways if each.both_ways else self.link), each.everyone / self.shared)
            for each in rounds
        )


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

    def rounds(self, given: float) -> list[Round]:
        """List the rounds of `PooledChunks` if the first rank gives so many keys to pools."""
        others, pairs = self.ranks - 1, self.ranks * (self.ranks - 1) // 2
        # the first rank has something of every later chunk; the last one asks all earlier ranks
        of_pairs = {"averages": self.asked, "sums": self.number, "totals": self.number, "counts": COUNTS, "replies": REPLY}
        # each rank gives to all later ones, and gets a whole pool
        listed, most = others * self.num, max(given, self.num)
        halo = self.halo * self.key + SIZE
        return [
            Round("headers", others * HEADER, 2 * pairs * HEADER, others, both_ways=True),
            *(Round(name, others * size, pairs * size, others) for name, size in of_pairs.items()),
            Round("weights", 4 * most + others * SIZE, 4 * listed + pairs * SIZE, others),
            Round("near", halo, others * halo, 1),
            Round("pool", most * self.key + others * SIZE, listed * self.key + pairs * SIZE, others),
        ]

    @property
    def asked(self) -> int:
        """Bytes of the averages of a chunk."""
        return self.averages * (self.head_dim + 1) * self.bytes_each + SIZE

    @property
    def number(self) -> int:
        """Bytes of one number for each average of a chunk."""
        return 4 * self.averages + SIZE

    @property
    def ring(self) -> list[Round]:
        """List the rounds of ring attention; two ranks send to each other."""
        size = self.tokens // self.ranks * self.key
        return [Round("ring", size, self.ranks * size, 1, both_ways=self.ranks == 2)] * (self.ranks - 1)

    @property
    def gather(self) -> list[Round]:
        """List the single round of an all-gather."""
        size = self.tokens // self.ranks * self.key * (self.ranks - 1)
        return [Round("near", size, self.ranks * size, self.ranks - 1, both_ways=True)]

    @property
    def received(self) -> int:
        """Bytes that the first rank receives."""
        return (self.ranks - 1) * (self.asked + self.number + REPLY + HEADER)

    def sent(self, given: float) -> float:
        """Bytes that the first rank sends, if it gives so many keys to pools."""
        each = self.number + COUNTS + HEADER + 2 * SIZE
        return given * (self.key + 4) + self.halo * self.key + SIZE + (self.ranks - 1) * each

    def given(self, pool_bytes: int) -> int:
        """Tell how many keys so many bytes are; the seals of a few messages are shorter than a key."""
        return pool_bytes // self.key

    @property
    def alike(self) -> float:
        """Keys that the first rank gives if pools take keys from everywhere alike."""
        return self.num * sum(1 / chunk for chunk in range(1, self.ranks))

    @property
    def worst(self) -> float:
        """Keys that the first rank gives if every pool takes its keys from there alone."""
        return self.num * (self.ranks - 1)

    @property
    def moved_by_ring(self) -> float:
        """Bytes that ring attention, or an all-gather, moves through each rank."""
        return (self.tokens - self.tokens / self.ranks) * self.key

    def most(self, given: float) -> float:
        """Bytes through the busiest rank, sent or received, whichever are more."""
        # of the keys of its own pool, and of the halo
        own = (self.num + self.halo) * self.key + 4 * self.num + 3 * SIZE
        second = replace(self, ranks=self.ranks - 1).received + HEADER + own + self.number + COUNTS
        return max(self.received, self.sent(given), second)


def read(kind: str) -> list[dict]:
    return [record for record in map(json.loads, RECORDS.read_text().splitlines()) if record["kind"] == kind]


def fitted(records: Sequence[dict]) -> tuple[Wire, list[float]]:
    """Fit latency and bandwidth to the median times of plain patterns, on one wire among as many ranks.

    Over the loopback all bytes pass the same cores; a link of its own is a rank's.

    Returns:
        the wire, and the fitted times over the measured ones.
    """
    plain = [record for record in records if "bytes" in record]
    times = torch.tensor([record["median_s"] / record["rounds"] for record in plain], dtype=torch.float64)
    shared, rows = plain[0]["wire"] == "loopback", []
    for record in plain:
        size, alike = record["bytes"], record["way"] == "alike"
        rows.append([1, size * (record["ranks"] if alike else 1)] if shared else [1, size * (not alike), size * alike])
    found, ratios = _fit(torch.tensor(rows, dtype=torch.float64), times)
    latency, *each = found
    rates = {"shared": 1 / each[0], "link": math.inf, "both_ways": math.inf}
    if not shared:
        rates = {"link": 1 / each[0], "both_ways": 1 / each[1]}
    return Wire(latency, 0.0, **rates), ratios


def _fit(rows: torch.Tensor, times: torch.Tensor) -> tuple[list[float], list[float]]:
    """Find positive factors of the columns: least squares of the logarithms of fitted over measured times."""
    log = (times[:, None] / rows.clamp(min=1)).amin(0).log()
    for _ in range(100):
        fitted_times = rows @ log.exp()
        slope = rows * log.exp() / fitted_times[:, None]
        log = log + 0.5 * torch.linalg.lstsq(slope, (times / fitted_times).log()[:, None]).solution[:, 0]
    return log.exp().tolist(), (rows @ log.exp() / times).tolist()


@dataclass(frozen=True)
class Compared:
    """A measured case beside its prediction."""

    record: dict
    rounds: list[Round]
    seconds: float

    @property
    def ratio(self) -> float:
        return self.seconds / self.record["median_s"]


def rounds_of(record: dict) -> list[Round]:
    """Give the rounds of a measured case; of `PooledChunks`, for the keys that its first rank gave."""
    case = Case(record["tokens"], record["ranks"], record["num"], record["tokens"] // record["ranks"] // 32)
    if record["way"] == "pooled":
        return case.rounds(case.given(record["sent"][0][record["purposes"].index("pool")]))
    return case.ring if record["way"] == "ring" else case.gather


def compared(records: Sequence[dict]) -> list[Compared]:
    """Predict what was measured on one wire among as many ranks from the plain patterns of the same run."""
    wire, _ = fitted(records)
    ways = [(record, rounds_of(record)) for record in records if "tokens" in record]
    return [Compared(record, rounds, wire.seconds(rounds)) for record, rounds in ways]


def runs() -> list[list[dict]]:
    """Give the records of times, one list for each wire and number of ranks."""
    by = sorted(read("times"), key=lambda record: (record["wire"], record["ranks"]))
    return [list(each) for _, each in itertools.groupby(by, key=lambda record: (record["wire"], record["ranks"]))]


def check() -> None:
    """Compare the model with what was counted and measured."""
    for record in read("bytes"):
        if record["way"] != "pooled":
            continue
        case = Case(record["tokens"], record["ranks"], record["num"], record["chunk"] // 32)
        first = record["by_purpose"][0]
        given = case.given(first["sent"]["pool"])
        print(
            f"{case.tokens} tokens, {case.ranks} ranks: {record['most']} bytes counted, {case.most(given):.0f} by the model "
            f"for the {given:.0f} keys that the first rank gave,\n  {case.most(case.alike):.0f} if pools took keys from "
            f"everywhere alike, {case.most(case.worst):.0f} at worst; {record['rounds']} rounds counted, "
            f"{len(case.rounds(given))} by the model"
        )
    for records in runs():
        wire, residuals = fitted(records)
        print(
            f"{records[0]['wire']}, {records[0]['ranks']} ranks, load {records[0]['load']:.2f}: {1e3 * wire.latency:.3f} ms "
            f"a round, {wire.link / 1e6:.0f} MB/s a rank, {wire.both_ways / 1e6:.0f} both ways, {wire.shared / 1e6:.0f} in "
            f"all; fitted over measured {min(residuals):.2f} to {max(residuals):.2f}"
        )
        for each in compared(records):
            low, high = (1e3 * value for value in each.record["quartiles_s"])
            print(
                f"  {each.record['way']:10} {each.record['tokens']:6} tokens: {1e3 * each.seconds:7.2f} ms predicted, "
                f"{1e3 * each.record['median_s']:7.2f} measured ({low:.2f} to {high:.2f}), ratio {each.ratio:.2f}"
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
    """Plot what `check` prints of times."""
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
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare the model with counted bytes and measured times")
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
