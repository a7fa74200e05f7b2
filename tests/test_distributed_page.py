"""docs/distributed.md: its tables are what the records and the model say."""

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "distributed.md").read_text()
RECORDS = [json.loads(line) for line in (ROOT / "benchmarks/records/distributed.jsonl").read_text().splitlines()]
# a prediction is right within this factor
FACTOR = 1.5


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """Import a module of the benchmarks."""
    pytest.importorskip("matplotlib", reason="the projection draws a picture")
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module


def of_kind(kind: str) -> list[dict]:
    return [record for record in RECORDS if record["kind"] == kind]


def test_counted_bytes():
    bytes_of = {(each["tokens"], each["ranks"], each["way"]): each for each in of_kind("bytes")}
    for (tokens, ranks, way), ours in bytes_of.items():
        if way == "pooled":
            ring = bytes_of[tokens, ranks, "ring"]["most"]
            assert ring == bytes_of[tokens, ranks, "all-gather"]["most"]
            row = f"| {tokens:,} | {ranks} | {ours['chunk']:,} | {ours['most'] / 2**20:.2f} MiB | {ring / 2**20:.2f} MiB |"
            assert f"{row} {ring / ours['most']:.1f} |" in PAGE
    # the bar: twenty times fewer at 131,072 tokens on 8 ranks
    assert bytes_of[131_072, 8, "ring"]["most"] >= 20 * bytes_of[131_072, 8, "pooled"]["most"]


NAMES = {
    "exact": "exact",
    "default": "default on one machine (`DrawAlike`)",
    "pooled": "`PooledChunks()`: chunks of 16,384, 2,048 slots, 2,048 averages",
    "pooled:2048:16384:2048": "`PooledChunks()`: chunks of 16,384, 2,048 slots, 2,048 averages",
    "pooled:2048:4096:1024": "`PooledChunks(chunk=4096, averages=1024)`, as on 8 ranks",
    "control": "control: uniform draws at as many slots",
    "control:2688": "control: uniform draws at as many slots",
}


def row_of(name: str) -> list[str]:
    """Find the row of a method in the table of what few bytes cost."""
    cells = [[cell.strip() for cell in line.strip("| ").split("|")] for line in PAGE.splitlines() if line.startswith("|")]
    (row,) = (each for each in cells if each[0] == NAMES[name])
    return row


def test_errors():
    for record in of_kind("error"):
        row = row_of(record["name"])
        assert row[1].startswith(f"{record['pairs']:,.0f}")
        assert row[3] == f"{record['error']:.3f}"


def test_loss_and_retrieval():
    alone = [json.loads(line) for line in (ROOT / "benchmarks/records/long_context.jsonl").read_text().splitlines()]
    alone = [each for each in alone if (each["model"], each["length"], each["run_on"]) == ("reference", 32_768, "cpu")]
    passes = [each for each in alone if each["name"] in ("exact", "default")] + of_kind("long_context")
    found = {(each["name"], each["document"]): each for each in passes if each["seed"] == 0}
    for name in ("exact", "default", "pooled:2048:16384:2048", "pooled:2048:4096:1024", "control:2688"):
        of_documents = [found[name, document] for document in range(4)]
        if name != "exact":
            assert all(each["approximated"] == each["calls"] > 0 and each["share_of_exact"] < 1 for each in of_documents)
        exact = [found["exact", document]["nats_per_byte"] for document in range(4)]
        added = sum(each["nats_per_byte"] - other for each, other in zip(of_documents, exact, strict=True)) / 4
        right = sum(each["retrieval"] for each in of_documents) / 4
        assert row_of(name)[1].split("; ")[-1].removesuffix(" on the model") == f"{of_documents[0]['pairs']:,.0f}"
        assert row_of(name)[2] == f"{of_documents[0]['selection_pairs']:,.0f}"
        assert row_of(name)[4:] == ["0" if name == "exact" else f"+{added:.4f}", f"{right:.3f}"]


def test_the_model_gives_the_counted_bytes_and_the_projected_ones(module):
    case_of, projected = module("distributed_case"), module("distributed_model")
    for record in of_kind("bytes"):
        if record["way"] == "pooled":
            case = case_of.Case(record["tokens"], record["ranks"], record["num"], record["averages"])
            given = case.given(record["by_purpose"][0]["sent"]["pool"])
            assert case.most(given) == record["most"]
            assert len(case.rounds(given)) == record["rounds"]
    for row in projected.table(case_of.Wire()):
        shown = f"| {row['ranks']:,} | {row['tokens'] // 10**6}M | "
        (line,) = (line for line in PAGE.splitlines() if line.startswith(shown))
        cells = [float(cell.replace(",", "")) for cell in line.strip("| ").split("|")[2:]]
        wanted = ("MB", "MB at worst", "MB of a ring", "fewer", "ms", "ms at worst", "ms of a ring", "ms of an all-gather")
        # as many digits as the page shows
        assert cells == pytest.approx([row[name] for name in wanted], rel=0.04)


def test_the_model_gives_the_bytes_of_every_round(module):
    model = module("distributed_check")
    for record in (record for record in of_kind("times") if record["way"] == "pooled"):
        both = [[max(sent, received) for sent, received in zip(*sides, strict=True)] for sides in _sides(record)]
        for number, each in enumerate(model.rounds_of(record)):
            assert each.purpose == record["purposes"][number]
            assert each.busiest == max(own[number] for own in both)
            assert each.everyone == sum(own[number] for own in record["sent"])


def _sides(record: dict) -> list[tuple[list[int], list[int]]]:
    return list(zip(record["sent"], record["received"], strict=True))


def test_the_model_predicts_the_measured_times(module):
    model = module("distributed_check")
    runs = model.runs()
    assert {(each[0]["wire"], each[0]["ranks"]) for each in runs} == {
        (wire, ranks) for wire in ("loopback", "links of 1000 Mbit/s") for ranks in (2, 4)
    }
    for records in runs:
        for each in model.compared(records):
            name = f"{records[0]['wire']}, {records[0]['ranks']} ranks, {each.record['way']}, {each.record['tokens']} tokens"
            assert 1 / FACTOR < each.ratio < FACTOR, name
            start = f"| {records[0]['wire']} | {records[0]['ranks']} | {each.record['tokens']:,} | "
            (line,) = (line for line in PAGE.splitlines() if line.startswith(start))
            column = ("pooled", "ring", "all-gather").index(each.record["way"])
            shown = f"{1e3 * each.seconds:.1f} / {1e3 * each.record['median_s']:.1f}"
            assert line.removeprefix(start).strip("| ").split(" | ")[column] == shown, name


def test_host_times_of_planning():
    for record in of_kind("plan"):
        (line,) = (line for line in PAGE.splitlines() if line.startswith(f"| {record['ranks']:,} | ") and "ms |" in line)
        assert f" {1e3 * record['median_s']:.1f} ms |" in line
