"""The tables and the picture of scatterbrain.py, from its records alone."""

import json
from collections.abc import Iterable
from pathlib import Path

RECORDS = Path(__file__).parent / "records" / "scatterbrain.jsonl"
PICTURE = Path(__file__).parents[1] / "docs" / "scatterbrain.png"


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def write(records: Iterable[dict]) -> None:
    raise NotImplementedError


def draw(records: Iterable[dict], path: Path) -> None:
    raise NotImplementedError
