"""The section of LevAttention in docs/relatives.md: its table is what the records say."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
IMAGES = pytest.mark.parametrize("images", ["digits", "mnist"])


@pytest.fixture(scope="module")
def made() -> ModuleType:
    found = importlib.util.spec_from_file_location("lev_attention_table", ROOT / "benchmarks" / "lev_attention_table.py")
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def section() -> str:
    text = (ROOT / "docs" / "relatives.md").read_text()
    return text.partition("\n## LevAttention\n")[2].partition("\n## ")[0]


@IMAGES
def test_the_page_shows_the_table_of_the_records(made, images):
    begin, end = made.MARKS[images]
    assert section().partition(begin)[2].partition(end)[0].strip() == made.table(made.read(made.RECORDS[images])).strip()


@IMAGES
def test_every_approximation_scored_fewer_pairs(made, images):
    records = made.read(made.RECORDS[images])
    assert {each["images"] for each in records} == {images}
    full = {"softmax", "square of q.k, all keys"}
    assert {each["attention"] for each in records} >= {"softmax", "softmax over top leverage", "softmax over random keys"}
    for each in records:
        assert "+changes" not in each["commit"]
        assert (each["share_of_pairs"] < 1) == (each["attention"] not in full)
    assert len({each["seed"] for each in records if each["attention"] == "softmax"}) >= 5


def lines(trained: list[float], dropped: list[float]) -> list[dict]:
    top, random = "softmax over top leverage", "softmax over random keys"
    rows = {
        ("softmax", "softmax"): [1.0] * len(trained),
        (top, top): trained,
        (top, "softmax"): dropped,
        (random, random): [0.7] * len(trained),
    }
    about = {"keys": 10, "tokens": 64, "test_images": 9, "plan": {"epochs": 2}, "versions": {"torch": "2"}, "commit": "abc"}
    return [
        about | {"attention": row[0], "weights_of": row[1], "seed": seed, "accuracy": value, "share_of_pairs": 0.2}
        for row, values in rows.items()
        for seed, value in enumerate(values)
    ]


@pytest.mark.parametrize(
    ("trained", "dropped", "said"),
    [
        ([0.95, 0.95, 0.96], [0.2, 0.2, 0.21], ["reproduced", "reproduced", "true here"]),
        ([0.5, 0.5, 0.51], [0.9, 0.9, 0.91], ["refuted here"] * 3),
        (
            [0.6, 0.8, 1.0],
            [0.3, 0.6, 0.9],
            ["undecided: the interval holds the bar"] * 2 + ["undecided: the interval holds 0"],
        ),
    ],
)
def test_a_claim_is_judged_by_its_interval(made, trained, dropped, said):
    assert re.findall(r"\*\*(.*)\*\*", made.table(lines(trained, dropped))) == said
