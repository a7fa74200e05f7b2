"""The benchmark of tolerances: cases that are recorded are not run again, and claims come from all of them."""

import json
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import torch

import hyperattention as ha
from problems import tensors


@pytest.fixture(scope="module")
def script() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
        return import_module("tolerance")


@pytest.fixture
def benchmark(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    # which asks git, for seconds on a busy machine
    monkeypatch.setattr(script, "environment", lambda: {"commit": "none", "threads": 1})
    return script


def judged(benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, path: Path, **arguments: int) -> list[str]:
    """Run the cases of a model of two layers and two kv heads, on random inputs; the names of those that were judged."""
    ran = []

    def case(name):
        ran.append(f"{name.inputs} {name.number} {name.layer} {name.kv_head}")
        return benchmark.Inputs(name, tensors(name.length, heads=2, kv_heads=1), {"seed": name.number})

    def names(loaded, document, length):
        return [benchmark.Name(benchmark.CAPTURED, document, length, layer, head) for layer in range(2) for head in range(2)]

    monkeypatch.setattr(benchmark, "load_reference", lambda: None)
    monkeypatch.setattr(benchmark, "held_out_documents", lambda length, count: range(3))
    monkeypatch.setattr(benchmark, "samples_of_documents", lambda documents: documents)
    monkeypatch.setattr(benchmark, "captured_names", names)
    monkeypatch.setattr(benchmark, "captured_cases", lambda loaded, sample, wanted: map(case, wanted))
    monkeypatch.setattr(benchmark, "structured_case", case)
    benchmark.run_cases(**{"first": 0, "documents": 1, "structured": 0, "length": 64, "path": path} | arguments)
    return ran


def test_a_case_is_judged_once_and_a_run_goes_on_from_its_record(benchmark, monkeypatch, tmp_path):
    path = tmp_path / "tolerance.jsonl"
    first = judged(benchmark, monkeypatch, path, structured=1)
    assert first == ["captured 0 0 0", "captured 0 0 1", "captured 0 1 0", "captured 0 1 1", "scattered 0 0 0"]
    # one tolerance is missing, as after an interruption: that case runs again
    lines = path.read_text().splitlines()
    path.write_text("".join(line + "\n" for line in lines[1:]))
    assert judged(benchmark, monkeypatch, path, documents=2, structured=2) == [
        "captured 0 0 0", *(f"captured 1 {layer} {head}" for layer in range(2) for head in range(2)), "low rank 0 0 0",
    ]  # fmt: skip
    assert judged(benchmark, monkeypatch, path, first=1) == []
    record = json.loads(lines[0])
    assert {"inputs", "number", "length", "layer", "kv_head", "tolerance", "threads", "commit", "options"} <= set(record)
    assert record["within"]
    assert record["share_of_pairs"] == 1


def test_exact_attention_runs_once_for_all_tolerances(benchmark, monkeypatch):
    ran = []
    monkeypatch.setattr(benchmark.Inputs, "attend", lambda self, method: ran.append(method) or torch.ones(1, 2, 64, 8))
    name = benchmark.Name("scattered", 0, 64)
    case = benchmark.Inputs(name, tensors(64, heads=2, kv_heads=1), {"seed": 0})
    assert len([*benchmark.judge_case(case)]) == 2
    assert ran == [ha.Exact()]
    # a captured call brings its own
    known = benchmark.Inputs(name, case.tensors, {"seed": 0}, torch.ones(1, 2, 64, 8))
    assert len([*benchmark.judge_case(known)]) == 2
    assert ran == [ha.Exact()]


def test_claims_are_of_the_captured_cases_of_a_length_and_are_written_once(benchmark, tmp_path):
    def line(inputs, length, share, within, tolerance=0.1):
        fields = {"inputs": inputs, "length": length, "tolerance": tolerance, "within": within, "share_of_pairs": share}
        known = {"part": "case", "number": 0, "layer": 0, "kv_head": 0, "exact_heads": 0.5, "bounds_hold": True}
        return json.dumps(benchmark.environment() | known | fields)

    path = tmp_path / "tolerance.jsonl"
    lines = [
        line("captured", 32768, 0.2, True),
        line("captured", 32768, 0.6, False),
        line("low rank", 32768, 0.9, True),
        line("captured", 8192, 0.7, True),
    ]
    path.write_text("".join(each + "\n" for each in lines))
    for _ in range(2):
        figures = benchmark.write_figures(path)
    within, share, short, _ = figures
    assert (within["value"], within["met"]) == (0.5, False)
    assert (share["value"], share["met"], share["bar"]) == (pytest.approx(0.4), False, "<= 0.35x")
    assert "2 captured" in share["claim"]
    assert "low rank, 1: 100.0% within, 0.90" in share["beside"]
    assert "8,192 tokens" in short["claim"]
    records = benchmark.read(path)
    assert len(records) == len(figures) + len(lines)
