"""The comparison over budgets: what it measures is what an audit says, and what it concludes is true of planted results."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from rich.console import Console

import hyperattention as ha
from assertions import assert_exact
from hyperattention.bench import frontier
from hyperattention.bench.call import BenchCall
from hyperattention.bench.candidates import CONTROL, OURS, OWN, Candidate, at_budget, candidates
from hyperattention.bench.front import error_at, on_front
from hyperattention.bench.frontier import MeasureSettings, Point, measure_frontier, steps_of
from hyperattention.bench.ranking import not_told_apart, rank
from hyperattention.bench.rows import Row, find_default
from hyperattention.cli.support import numbers
from hyperattention.report import demo, pareto
from hyperattention.report.pareto import structured_calls
from hyperattention.report.tables import frontier_table
from hyperattention.synthetic import structured
from test_cli import invoke, read_lines

ROOT = Path(__file__).parent.parent
BENCHMARKS = ROOT / "benchmarks"
LENGTH, ROWS = 1200, 64
BUDGETS = (512, 576)
FAMILIES = ["sinks_window", CONTROL, OURS]
FIELDS = {
    "row", "family", "title", "label", "slots", "exact", "oracle", "method", "approximated", "complete", "pairs_per_query",
    "selection_pairs_per_query", "share_of_exact_pairs", "median_s", "quartiles_s", "seconds", "error", "percentile_95",
    "operator_error", "error_by_head", "interval_by_head", "percentile_95_by_head", "operator_error_by_head", "front",
    "calls",
}  # fmt: skip


@pytest.fixture(scope="module")
def calls() -> tuple[BenchCall, ...]:
    shared = structured(LENGTH, heads=4, kv_heads=2, seed=9)
    return (*structured_calls(LENGTH, 2, seed=5), BenchCall(shared.q, shared.k, shared.v, scale=0.1, layer=2, seed=7))


@pytest.fixture(scope="module")
def points(calls: tuple[BenchCall, ...]) -> dict[str, Point]:
    steps: list[str] = []
    who, care = candidates(BUDGETS, FAMILIES), MeasureSettings(ROWS, repeats=2, timed=1)
    found = measure_frontier(calls, who, care, steps.append)
    assert len(steps) == steps_of(calls, who, care) == len(who) * (3 + 2)
    return {point.candidate.row.name: point for point in found}


def test_errors_are_those_of_an_audit_of_each_output(calls: tuple[BenchCall, ...], points: dict[str, Point]) -> None:
    point = points[f"{OURS}@512"]
    for number, call in enumerate(calls):
        method = point.candidate.row.method
        inputs, shared = (call.q, call.k, call.v), {"is_causal": True, "scale": call.scale, "enable_gqa": number == 2}
        out = ha.attention(*inputs, method=method, seed=call.seed, layer=call.layer, **shared)
        report = ha.audit(*inputs, out, rows=ROWS, seed=call.seed * 1009 + call.layer, **shared)
        for figure, values in point.figures.items():
            assert_exact(torch.tensor(values[number]), getattr(report, figure)[0])
        for end, values in zip(report.interval, point.interval, strict=True):
            assert_exact(torch.tensor(values[number]), end[0])


def test_exact_rows_are_computed_once_for_all_methods(calls: tuple[BenchCall, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    assert not torch.equal(calls[0].q, calls[1].q)
    measured = []

    def counted(*arguments: object) -> object:
        measured.append(arguments)
        return real(*arguments)

    real = frontier.measure_rows
    monkeypatch.setattr(frontier, "measure_rows", counted)
    measure_frontier(calls, candidates(BUDGETS, [CONTROL]), MeasureSettings(ROWS, 1, 1))
    assert len(measured) == len(calls)


def test_heads_average_to_the_overall_error(points: dict[str, Point]) -> None:
    for point in points.values():
        record = point.record()
        heads = torch.tensor(record["error_by_head"])
        assert heads.shape == (3, 4)
        # float32 by head, and means of them in another order
        assert point.error.mean == pytest.approx(heads.mean().item(), rel=1e-6, abs=0)
        assert record["percentile_95"] == pytest.approx(
            torch.tensor(record["percentile_95_by_head"]).mean().item(), rel=1e-6
        )
        assert sum(point.pieces) / len(point.pieces) == pytest.approx(point.error.mean, rel=1e-5)
        low, high = (torch.tensor(end) for end in record["interval_by_head"])
        assert (low <= heads).all()
        assert (heads <= high).all()


def test_records_say_all_and_only_exact_attention_has_no_error(points: dict[str, Point]) -> None:
    for name, point in points.items():
        record = point.record()
        assert record.keys() == FIELDS
        assert (record["exact"], point.error.mean == 0, point.label == "exact (SDPA)") == ((name == "exact",) * 3)
        assert record["approximated"] is (name != "exact")
        assert len(record["seconds"]) == 2
        assert record["calls"][2] == {"seed": 7, "layer": 2, "q": (1, 4, LENGTH, 64), "k": (1, 2, LENGTH, 64)}
        assert 0 < record["quartiles_s"][0] <= record["median_s"] <= record["quartiles_s"][1]
        if name != "exact":
            assert record["pairs_per_query"] == record["slots"]
            assert 0 < point.error.low <= point.error.mean <= point.error.high
    assert points["exact"].front


def test_more_keys_err_less(points: dict[str, Point]) -> None:
    for family in FAMILIES:
        assert points[f"{family}@576"].error.mean < points[f"{family}@512"].error.mean


def test_an_oracle_is_timed_once(calls: tuple[BenchCall, ...]) -> None:
    exact, control = candidates((512,), [CONTROL])
    oracle = replace(control, title="an oracle", row=replace(control.row, name="oracle@512"))
    steps: list[str] = []
    who, care = (exact, control, oracle), MeasureSettings(ROWS, 3, 2)
    found = measure_frontier(calls, who, care, steps.append)
    assert [len(point.timing.seconds) for point in found] == [3, 3, 1]
    assert len(steps) == steps_of(calls, who, care) == 3 * 3 + 2 * (3 + 3 + 1)
    frontier_table(found, "with an oracle")


def test_a_frontier_needs_calls_and_exact_attention(calls: tuple[BenchCall, ...]) -> None:
    who = candidates((512,), [CONTROL])
    for given, methods in (((), who), (calls, who[1:])):
        with pytest.raises(ValueError, match="at least one call, and exact attention"):
            measure_frontier(given, methods, MeasureSettings(ROWS, 1, 1))


def test_candidates_list_no_more_than_their_budget() -> None:
    who = candidates((512, 768))
    assert [each.exact for each in who].count(True) == 1
    assert who[0].exact
    assert len({each.row.name for each in who}) == len(who)
    for each in who[1:]:
        # the published algorithm is exact below its own length, and lists what it needs there
        if each.family != "published":
            assert each.row.cost(8192, True).pairs <= each.slots
    ours, control = ({each.slots: each for each in who if each.family == family} for family in (OURS, CONTROL))
    for slots in (512, 768):
        assert ours[slots].row.cost(8192, True).pairs == control[slots].row.cost(8192, True).pairs == slots


def test_an_oracle_is_known_by_its_label() -> None:
    label, method = "each query's own top keys (oracle)", ha.Exact()
    named = [Candidate("top_keys", title, 512, Row("top_keys@512", title, method)) for title in (label, "top keys")]
    assert [each.oracle for each in named] == [True, False]


def test_the_default_at_its_own_budget_is_the_default() -> None:
    usual = find_default()
    assert at_budget(usual, round(usual.cost(8192).pairs)) == usual
    assert at_budget(usual, 2048).cost(8192).pairs == 2048
    with pytest.raises(ValueError, match="give at least 146"):
        at_budget(usual, 145)
    assert at_budget(usual, 146).cost(8192).pairs == 146


@pytest.mark.parametrize(
    ("budgets", "families", "message"),
    [((), None, "give at least one"), ((512, 512), None, "each only once"), ((512,), ["none"], "no method is called none")],
)
def test_candidates_refuse_what_cannot_take_part(budgets: tuple[int, ...], families: list[str] | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        candidates(budgets, families)


def test_the_front_is_what_nothing_beats() -> None:
    spots = [(1.0, 0.5), (2.0, 0.2), (2.0, 0.3), (3.0, 0.2), (4.0, 0.0), (1.0, 0.5), (0.5, float("nan"))]
    assert on_front(spots) == (True, True, False, False, True, True, True)
    assert on_front([(1.0, float("nan")), (1.0, 0.5)]) == (False, True)


def test_errors_at_equal_time_are_read_off_in_logarithms() -> None:
    law = [(t, 0.8 / t**1.5) for t in (1.0, 2.0, 8.0)]
    for seconds in (1.0, 1.5, 2.0, 5.0, 8.0):
        assert error_at(seconds, law) == pytest.approx(0.8 / seconds**1.5)
    assert error_at(0.9, law) is None
    # beyond the last budget with the mean slope; a single budget tells none
    assert error_at(100.0, law) == pytest.approx(0.8 / 100**1.5)
    assert error_at(100.0, law[:1]) == law[0][1]
    assert error_at(100.0, [(1.0, 0.5), (2.0, 0.0)]) == 0.0
    # a slower budget that errs more is not chosen
    assert error_at(5.0, [*law, (4.0, 0.7)]) == pytest.approx(0.8 / 5**1.5)
    assert error_at(1.5, [(1.0, 0.5), (2.0, 0.0)]) == 0.5
    assert error_at(1.0, []) is None


def test_neighbours_are_told_apart_by_what_they_share() -> None:
    hard = [0.1, 0.9, 0.3, 0.7, 0.2, 0.8]
    jitter = [0.01, -0.01, 0.02, -0.02, 0.01, -0.01]
    steps = rank(
        {
            "worst": [x + 0.2 for x in hard],
            "twin": [x + e for x, e in zip(hard, jitter, strict=True)],
            "best": [x - 0.001 for x in hard],
        }
    )
    assert [(step.better, step.worse, step.told_apart) for step in steps] == [
        ("best", "twin", False),
        ("twin", "worst", True),
    ]
    assert not_told_apart(steps) == (("best", "twin"),)
    # Student's t for 5 degrees of freedom, from a table
    half = 2.571 * torch.tensor(jitter, dtype=torch.float64).std().item() / 6**0.5
    assert (steps[0].low, steps[0].high) == (pytest.approx(0.001 - half, rel=1e-2), pytest.approx(0.001 + half, rel=1e-2))
    (single,) = rank({"a": [0.1], "b": [0.5]})
    assert (single.low, single.told_apart) == (None, False)
    with pytest.raises(ValueError, match="same pieces"):
        rank({"a": [0.1], "b": [0.1, 0.2]})


def test_chains_end_where_a_difference_shows() -> None:
    shifts = {"a": 0.0, "b": 0.0, "c": 1.0, "d": 1.0, "e": 1.0, "f": 2.0}
    noise = [[0.01, -0.01, 0.005], [-0.01, 0.01, 0.006], [0.0, 0.02, -0.01]] * 2
    values = {name: [shift + e for e in noise[i]] for i, (name, shift) in enumerate(shifts.items())}
    assert [set(chain) for chain in not_told_apart(rank(values))] == [{"a", "b"}, {"c", "d", "e"}]


def spot(family: str, slots: int, seconds: float, error: float) -> dict:
    ends = {"mean": error, "low": 0.9 * error, "high": 1.1 * error}
    return {
        "part": "attention", "family": family, "title": family, "slots": slots, "median_s": seconds, "error": ends,
        "exact": family == "exact", "oracle": "oracle" in family,
    }  # fmt: skip


@pytest.fixture
def claims(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import pareto_claims

    return pareto_claims


PLANTED = [
    spot("exact", 0, 1.5, 0.0),
    spot("control", 512, 1.0, 0.4), spot("control", 1024, 2.0, 0.2),
    spot("blocks", 512, 1.0, 0.2), spot("blocks", 1024, 4.0, 0.1),
    spot("oracle_top", 512, 1.0, 0.001), spot("oracle_top", 1024, 1.0, 0.001),
    spot("default", 512, 1.2, 0.3), spot("default", 1024, 2.0, 0.07),
]  # fmt: skip


def test_errors_at_equal_pairs_count_only_within_the_time_allowed(claims) -> None:
    record = claims.equal_pairs(PLANTED, "here")
    assert (record["value"], record["met"]) == (pytest.approx(0.35), True)
    slow = [*PLANTED[:-1], spot("default", 1024, 2.6, 0.07)]
    record = claims.equal_pairs(slow, "here")
    assert (record["value"], record["met"]) == (pytest.approx(0.75), False)
    slower = [*PLANTED[:-2], spot("default", 512, 1.3, 0.1), spot("default", 1024, 2.6, 0.1)]
    record = claims.equal_pairs(slower, "here")
    assert (record["value"], record["met"]) == (pytest.approx(0.25), False)
    assert "1.30x the time" in record["shown"]


def test_errors_at_equal_time_are_compared_with_the_best_other_method(claims) -> None:
    # in 2 s, halfway between 1 and 4 in logarithms, blocks reach sqrt(0.2 * 0.1)
    record = claims.equal_time(PLANTED, "here", 1024)
    assert record["value"] == pytest.approx(0.07 / 0.02**0.5)
    assert (record["met"], "blocks" in record["shown"]) == (True, True)
    worse = claims.equal_time([*PLANTED[:-1], spot("default", 1024, 2.0, 0.12)], "here", 1024)
    assert not worse["met"]
    # nobody is as fast: the fastest other takes the time it takes
    fast = claims.equal_time([*PLANTED[:-1], spot("default", 1024, 0.5, 0.1)], "here", 1024)
    assert fast["value"] == pytest.approx(0.1 / 0.2)


def save_reference(folder: Path) -> Path:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=4096, initializer_range=0.3,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_reference(tmp_path_factory.mktemp("reference"))


def test_pareto_measures_all_parts_and_writes_them_down(reference: Path, tmp_path: Path) -> None:
    plot, records = tmp_path / "pareto.png", tmp_path / "pareto.jsonl"
    code, output = invoke(
        "pareto", "--quick", "--length", 2048, "--budgets", "512,640", "--methods", ",".join(FAMILIES), "--reference",
        reference, "--plot", plot, "--json", records,
    )  # fmt: skip
    assert code == 0, output
    assert plot.read_bytes().startswith(b"\x89PNG")
    for part in ("1. the reference model", "2. structured", "3. the reference model", "retrieval by distance", "dominated"):
        assert part in output
    # one document tells nothing of noise
    assert "The order of these methods may be due to chance (added loss, 1 documents)" in output
    lines = read_lines(records)
    names = ["exact", *(f"{family}@{slots}" for slots in (512, 640) for family in FAMILIES)]
    for inputs, heads, num_calls in (("model", 2, 2), ("structured", 4, 1)):
        found = [line for line in lines if line["part"] == "attention" and line["inputs"] == inputs]
        assert [line["row"] for line in found] == names
        for line in found:
            assert FIELDS | {"commit", "device", "versions", "threads", "length", "seed", "audit_rows"} <= line.keys()
            assert torch.tensor(line["error_by_head"]).shape == (num_calls, heads)
    losses = [line for line in lines if line["part"] == "loss"]
    assert [line["row"] for line in losses] == names
    assert (losses[0]["added_nats"], losses[0]["documents"], losses[-1]["approximated"]) == (0, 1, True)
    assert len([line for line in lines if line["part"] == "ranking"]) == 2 * 2 + 1
    assert all("Infinity" not in json.dumps(line) and "NaN" not in json.dumps(line) for line in lines)


def test_pareto_can_leave_the_model_running_out(reference: Path, tmp_path: Path) -> None:
    code, output = invoke(
        "pareto", "--quick", "--length", 1280, "--budgets", 512, "--methods", CONTROL, "--no-loss", "--reference", reference,
        "--plot", tmp_path / "pareto.png",
    )  # fmt: skip
    assert code == 0, output
    assert "all layers replaced" not in output


def test_errors_are_measured_on_as_many_documents_as_seeds(reference: Path) -> None:
    inputs = demo.DemoOptions(1280, reference=reference, documents=3)
    options = pareto.ParetoOptions(inputs, (512,), (CONTROL,), MeasureSettings(ROWS, 1, 1), seeds=2, loss=False)
    results = pareto.run(pareto.prepare(options), Console(quiet=True))
    model, made = (results.points[name][1] for name in (pareto.MODEL, pareto.STRUCTURED))
    # two layers of each document
    assert [(call["seed"], call["layer"]) for call in model.calls] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert [call["seed"] for call in made.calls] == [0, 1]
    assert results.judgements == ()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--budgets", "512,12x"), "give whole, positive numbers"),
        (("--budgets", "0"), "give whole, positive numbers"),
        (("--budgets", "40"), "is too small: give at least"),
        (("--methods", "control,nothing"), "no method is called nothing"),
        (("--length", 8192), "64 to 4,096"),
    ],
)
def test_pareto_refuses_what_it_cannot_run(reference: Path, arguments: tuple, message: str) -> None:
    code, output = invoke("pareto", "--reference", reference, *arguments)
    assert (code, message in output, "Traceback" in output) == (2, True, False), output


def test_budgets_are_numbers_with_commas() -> None:
    assert numbers("--budgets", "512, 1024") == (512, 1024)


@pytest.mark.heavy  # the whole script, in an interpreter of its own
def test_the_benchmark_runs_and_claims_from_its_records(reference: Path, tmp_path: Path) -> None:
    out, plot = tmp_path / "pareto.jsonl", tmp_path / "pareto.png"
    command = [sys.executable, BENCHMARKS / "pareto.py", "--toy", "--threads", "1", "--reference", reference]
    done = subprocess.run([*command, "--out", out, "--plot", plot], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = read_lines(out)
    figures = [line for line in lines if line["part"] == "figure"]
    assert len(figures) == 2 * 2
    for line in figures:
        assert line["claim"] in done.stdout
        assert {"bar", "value", "met", "shown", "beside", "commit", "device"} <= line.keys()
    # only the other methods have the largest budget, and no oracle runs
    largest = {line["family"] for line in lines if line["part"] == "attention" and line["slots"] == 768}
    assert largest.isdisjoint(OWN)
    assert "control" in largest
    assert not any(line.get("oracle") for line in lines)
    refused = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (refused.returncode, "nothing worth committing" in refused.stderr) == (2, True)
