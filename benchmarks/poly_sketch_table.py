"""The tables and the plot of polynomial attention, from the records of poly_sketch.py."""

import json
from pathlib import Path

ROOT = Path(__file__).parents[1]
RECORDS = ROOT / "benchmarks" / "records" / "poly_sketch.jsonl"


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def write_table(path: Path) -> None:
    raise NotImplementedError


def plot(path: Path) -> None:
    raise NotImplementedError
