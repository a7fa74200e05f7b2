"""What figures are made of: the sizes they are measured at, and claims with their bars."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from hyperattention.reference.model import WEIGHTS

Record = Mapping[str, object]


@dataclass(frozen=True)
class Plan:
    medium: int = 32768
    long: int = 131072
    longest: int = 2**20
    loaded: int | None = None
    gate_documents: int = 4
    repeats: int = 5
    long_repeats: int = 3
    audit_rows: int = 1024
    memory: bool = True
    reference: Path = WEIGHTS


TOY = Plan(
    medium=1024,
    long=2048,
    longest=4096,
    loaded=1024,
    gate_documents=2,
    repeats=1,
    long_repeats=1,
    audit_rows=64,
    memory=False,
)


def figure(claim: str, bar: str, value: float, met: bool, shown: str, beside: str) -> Record:
    """One claim: its bar, what was measured, whether that meets it, and what stands beside it."""
    return {"part": "figure", "claim": claim, "bar": bar, "value": value, "met": met, "shown": shown, "beside": beside}


def at_least(claim: str, value: float, bar: float, beside: str) -> Record:
    return figure(claim, f">= {bar:g}x", value, value >= bar, f"{value:.1f}x", beside)


def unbarred(claim: str, value: float, beside: str) -> Record:
    """A speed that nothing was promised of."""
    return figure(claim, "none", value, True, f"{value:.1f}x", beside)


def at_most(claim: str, value: float, bar: float, beside: str, unit: str = "x") -> Record:
    return figure(claim, f"<= {bar:g}{unit}", value, value <= bar, f"{value:.3g}{unit}", beside)


def pick(results: Iterable, name: str):
    return next(each for each in results if each.row == name)


def announce(name: str) -> None:
    print("   ", name, flush=True)
