"""What docs/models.md says of the pretrained model is what the committed records say; `make real` runs the model itself."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

REAL = Path(__file__).parents[1] / "benchmarks" / "real"


@pytest.fixture(scope="module")
def table() -> ModuleType:
    found = importlib.util.spec_from_file_location("real_model_table", REAL / "table.py")
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def test_the_page_shows_the_table_of_the_records(table):
    shown = table.PAGE.read_text().partition(table.BEGIN)[2].partition(table.END)[0]
    assert shown == table.table(table.read(), table.read(table.TIMES))


def test_the_figures_are_those_of_the_records(table):
    assert table.read(table.FIGURES) == table.figures(table.read(), table.read(table.TIMES))


def test_every_record_approximated_and_has_an_exact_one_beside_it(table):
    records = table.read()
    exact = {record["sample"] for record in records if record["name"] == "exact"}
    assert {record["text"] for record in records} == {"prose", "code"}
    for record in records:
        assert record["sample"] in exact
        assert "+changes" not in record["commit"]
        assert record["name"] == "exact" or (record["approximated"] > 0 and record["share_of_exact"] < 1)


def test_added_loss_and_the_larger_standard_error(table):
    exact = [{"nats": [10.0, 20.0], "tokens": 20, "nats_per_token": 1.5} for _ in range(2)]
    ours = [
        {"nats": [12.0, 22.0], "tokens": 20, "nats_per_token": 1.7},
        {"nats": [14.0, 26.0], "tokens": 20, "nats_per_token": 2.0},
    ]
    added, error = table.added_of([*zip(ours, exact, strict=True)])
    assert added == pytest.approx(0.35)
    # documents: +0.2 and +0.5, so 0.3 / sqrt(2) / sqrt(2); pieces: +0.2, +0.2, +0.4, +0.6, which spread less
    assert error == pytest.approx(0.15)
    # one document has pieces alone
    assert table.added_of([(ours[1], exact[0])])[1] == pytest.approx(0.1)


def test_a_document_that_one_method_has_not_read_is_left_out(table):
    records = [{"sample": sample, "name": name} for sample, name in [("a", "exact"), ("a", "fast"), ("b", "exact")]]
    assert table.read_by_all(records) == records[:2]


def test_speed_is_the_ratio_of_summed_medians(table):
    def seconds(*rounds: float) -> dict[str, list[float]]:
        return {"processor": [*rounds], "clock": [9.0, 9.0, 9.0]}

    times = [
        {"length": 8, "seconds": {"exact": seconds(4.0, 5.0, 90.0), "fast": seconds(1.0, 2.0, 3.0)}},
        {"length": 8, "seconds": {"exact": seconds(5.0, 5.0, 5.0), "fast": seconds(3.0, 3.0, 3.0)}},
        {"length": 4, "seconds": {"exact": seconds(1.0, 1.0, 1.0), "fast": seconds(1.0, 1.0, 1.0)}},
    ]
    assert table.speeds_of(times, 8)["fast"] == pytest.approx(2.0)


def test_the_page_keeps_what_stands_around_its_table(table, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{table.BEGIN}old\n{table.END}after\n")
    table.write_page([], [], page)
    assert page.read_text() == f"before\n{table.BEGIN}{table.END}after\n"
    page.write_text("no markers\n")
    with pytest.raises(SystemExit, match="must contain these two lines"):
        table.write_page([], [], page)


def test_the_figures_file_is_one_record_a_line(table, tmp_path):
    out = tmp_path / "figures.jsonl"
    table.write_figures(table.read(), table.read(table.TIMES), out)
    assert [json.loads(line)["part"] for line in out.read_text().splitlines()] == ["figure"] * len(table.read(out))
