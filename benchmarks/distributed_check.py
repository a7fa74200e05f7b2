"""Check the model of context parallelism on small cases: bytes beside counted ones, times beside measured ones.

python benchmarks/distributed_check.py
"""

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from distributed import RECORDS
from distributed_case import Case, Round, Wire


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
    case = Case(record["tokens"], record["ranks"], record["num"], record["averages"])
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
        case = Case(record["tokens"], record["ranks"], record["num"], record["averages"])
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


if __name__ == "__main__":
    check()
