"""A plan for a number of pairs: a sample of rows, the weight of every head, and the plan that follows from both."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import hyperattention as ha
from assertions import assert_exact
from hyperattention import select
from hyperattention.random import uniform
from tiny_models import LENGTH, NUM_LAYERS, build, tokens

pytest.importorskip("transformers")

from hyperattention.bench.rows import Row
from hyperattention.calibration import damage, sample
from hyperattention.calibration.calibrate import calibrate, steps_of
from hyperattention.calibration.damage import Probe, judged_rows, weigh_heads
from hyperattention.calibration.journal import Journal
from hyperattention.calibration.measure import measure_layer
from hyperattention.calibration.sample import sample_layer
from hyperattention.calibration.settings import CalibrationSettings
from hyperattention.integrations.transformers import use
from hyperattention.reference.call_recorder import CallInputs
from hyperattention.reference.model import LoadedModel
from hyperattention.reference.passes import run_pass
from hyperattention.reference.samples import EvaluationSample
from hyperattention.report.calibrate import CalibrateOptions
from hyperattention.report.method_names import short_name
from test_cli import invoke

NARROW = ha.Method(ha.Sinks(4), ha.Window(16), tile=32)
DRAWN = ha.Method(ha.Sinks(4), ha.Window(16), ha.Draw(64), tile=32)
LADDER = (ha.Exact(), NARROW, DRAWN)


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return LoadedModel(build("Llama", {}), "a tiny model")


@pytest.fixture(scope="module")
def samples() -> tuple[EvaluationSample, ...]:
    counted = torch.arange(1, LENGTH) >= LENGTH // 2
    return tuple(EvaluationSample(each, counted, int(counted.sum()), torch.zeros_like(counted)) for each in tokens(2))


def test_random_lines_are_not_judged_and_answers_are(samples: tuple[EvaluationSample, ...], monkeypatch) -> None:
    counted = torch.zeros(LENGTH - 1, dtype=torch.bool)
    counted[[200, 210]] = True
    asked = replace(samples[0], counted=counted, answer_index=(100, 300), answer_distance=(50, 50), answer_size=3)
    # a row predicts the next token
    assert judged_rows(asked).tolist() == [99, 100, 101, 200, 210, 299, 300, 301]
    monkeypatch.setattr(damage, "_PREDICTIONS", 3)
    assert judged_rows(asked).tolist() == [99, 200, 300]
    monkeypatch.setattr(damage, "_PREDICTIONS", 8)
    assert len(judged_rows(asked)) == 8
    assert not counted[[99, 299]].any()


@pytest.fixture(scope="module")
def calls(loaded: LoadedModel, samples: tuple[EvaluationSample, ...]) -> list[CallInputs]:
    found: list[CallInputs] = []
    exact = Row("exact", "exact", ha.Exact())
    run_pass(loaded, samples[0], exact, on_call=lambda call: found.append(replace(call, out=call.out.clone())))
    return found


def squared(out: torch.Tensor, exact: torch.Tensor) -> tuple[float, ...]:
    miss, size = ((x[0].double() ** 2).sum((1, 2)).view(2, 2).sum(1) for x in (out - exact, exact))
    return tuple((miss / size).tolist())


def test_a_short_layer_is_measured_on_all_rows(calls: list[CallInputs]) -> None:
    found, whole = sample_layer(calls[1], LADDER, 1, 5), measure_layer(calls[1], LADDER, 1, 5)
    assert (found.document, found.layer, found.shape, found.seconds) == (1, 1, (4, 2, 16, 16), ())
    for ours, theirs in zip(found.errors, whole.errors, strict=True):
        assert_exact(torch.tensor(ours), torch.tensor(theirs), size=1.0)
    assert found.errors[0] == found.squares[0] == (0.0, 0.0)
    shape = {"is_causal": True, "enable_gqa": True, "layer": 1, "seed": 6, "scale": calls[1].scale}
    exact, drawn = (
        ha.attention(calls[1].q, calls[1].k, calls[1].v, method=method, **shape) for method in (ha.Exact(), DRAWN)
    )
    assert_exact(torch.tensor(found.squares[2]), torch.tensor(squared(drawn, exact)), size=1.0)
    # the model's own output stands for exact attention, so none runs
    again = sample_layer(replace(calls[1], out=None), LADDER, 1, 5)
    assert_exact(torch.tensor(again.squares), torch.tensor(found.squares), size=1.0)


def test_a_long_layer_is_measured_on_parts_that_list_the_same_keys(
    calls: list[CallInputs], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sample, "_SPAN", 32)
    found = sample_layer(calls[1], LADDER, 0, 5, num_parts=3)
    # 10 spans of 32: three parts, three spans apart
    start = int(uniform((0x5A3E, 5, 1), "cpu") * 3)
    rows = torch.cat([torch.arange(32) + 32 * (start + 3 * part) for part in range(3)])
    assert len(rows) < LENGTH / 3
    shape = {"is_causal": True, "enable_gqa": True, "layer": 1, "seed": 5, "scale": calls[1].scale}
    q, k, v = calls[1].q, calls[1].k, calls[1].v
    exact, drawn = (ha.attention(q, k, v, method=method, **shape)[:, :, rows] for method in (ha.Exact(), DRAWN))
    assert_exact(torch.tensor(found.squares[2]), torch.tensor(squared(drawn, exact)), size=1.0)


def measured(calls: list[CallInputs], path: Path) -> Journal:
    kept = Journal(path, {"seed": 0})
    for call in calls:
        kept.add(sample_layer(call, LADDER, 0, 0))
    return kept


def test_a_weight_is_how_far_one_head_moves_the_predictions(
    loaded: LoadedModel, samples: tuple[EvaluationSample, ...], calls: list[CallInputs], tmp_path: Path
) -> None:
    kept, steps = measured(calls, tmp_path / "journal"), []
    weights = weigh_heads(Probe(loaded, samples[0], 0, LADDER, 2, 0), kept, steps.append)
    assert [len(weights[layer]) for layer in range(NUM_LAYERS)] == [2, 2]
    assert len(steps) == 4

    def predictions(method: ha.AttentionMethod) -> torch.Tensor:
        with torch.no_grad(), use(loaded.model, method, warn=False):
            logits = loaded.model(samples[0].tokens[None]).logits[0]
        return logits[LENGTH // 2 - 1 : -1].double().log_softmax(-1)

    exact = predictions(ha.Exact())
    for layer, head in ((0, 1), (1, 0)):
        one = [ha.Exact(), ha.Exact()]
        one[head] = DRAWN
        moved = predictions(ha.ByLayer({layer: ha.ByHead(tuple(one))}))
        divergence = (exact.exp() * (exact - moved)).sum(-1).mean().item()
        assert divergence > 1e-6
        found = weights[layer][head] * kept.measurements[layer].squares[2][head]
        assert found == pytest.approx(divergence, rel=1e-2)


def test_weights_resume_and_belong_to_their_candidate(
    loaded: LoadedModel, samples: tuple[EvaluationSample, ...], calls: list[CallInputs], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    kept, probe = measured(calls, tmp_path / "journal"), Probe(loaded, samples[0], 0, LADDER, 2, 0)
    ran: list[tuple[int, int]] = []
    whole = damage._divergence

    def count(probe: Probe, exact: torch.Tensor, layer: int, head: int, num_heads: int) -> float:
        if len(ran) == 3:
            raise KeyboardInterrupt
        ran.append((layer, head))
        return whole(probe, exact, layer, head, num_heads)

    monkeypatch.setattr(damage, "_divergence", count)
    with pytest.raises(KeyboardInterrupt):
        weigh_heads(probe, kept, lambda _: None)
    # killed in the middle of a line
    with (tmp_path / "journal").open("a") as file:
        file.write('{"document": 0, "layer": 1, "head": 1, "pla')
    again = Journal(tmp_path / "journal", {"seed": 0})
    assert again.measurements == kept.measurements
    assert again.divergences == kept.divergences
    # opening a journal writes it again, without the line that was cut
    assert Journal(tmp_path / "journal", {"seed": 0}).divergences == kept.divergences
    monkeypatch.setattr(damage, "_divergence", whole)
    weights = weigh_heads(probe, again, lambda _: None)
    assert ran == [(0, 0), (0, 1), (1, 0)]
    assert weights == weigh_heads(probe, Journal(tmp_path / "journal", {"seed": 0}), lambda _: None)
    # another candidate is another measurement
    assert again.divergence(0, 0, 0, 1) is None
    # a head whose candidate makes no error has no weight that could be measured
    assert set(weigh_heads(replace(probe, place=0), again, lambda _: None).values()) == {(0.0, 0.0)}


def test_a_plan_for_a_number_of_pairs(loaded: LoadedModel, samples: tuple[EvaluationSample, ...], tmp_path: Path) -> None:
    few = round(NARROW.cost(LENGTH).pairs + DRAWN.cost(LENGTH).pairs) // 2
    settings, steps = CalibrationSettings(pairs=few, ladder=LADDER, repeats=1), []
    plan = calibrate(loaded, samples, settings, tmp_path / "journal", steps.append)
    assert len(steps) == steps_of(loaded, samples, settings)
    assert plan.measured.pairs_per_query <= few
    methods = [method for served in plan.layers.values() for method in served.methods]
    assert {NARROW, DRAWN} == set(methods)
    worst = max(max(errors) for errors in plan.errors.values())
    assert worst <= plan.tolerance < worst + 1e-3
    # the journal serves another number of pairs, and the file of the plan is as any other
    whole = calibrate(loaded, samples, replace(settings, pairs=200), tmp_path / "journal")
    assert set(whole.layers.values()) == {ha.ByHead((ha.Exact(), ha.Exact()))}
    ha.save_plan(plan, tmp_path / "plan.json")
    assert ha.load_plan(tmp_path / "plan.json") == plan


def test_a_method_of_such_a_plan_has_a_short_name() -> None:
    method = ha.Method(ha.Sinks(16), ha.Window(64), select.DrawAlike(1680, rows=16))
    assert short_name(method) == "sinks 16 + window 64 + 1,680 for 16 alike"


def test_settings_take_a_tolerance_or_pairs() -> None:
    assert CalibrationSettings().tolerance == 0.05
    assert CalibrationSettings(pairs=500).tolerance is None
    with pytest.raises(ValueError, match=r"tolerance 0.1 and pairs 800: give one"):
        CalibrationSettings(0.1, pairs=800)
    for wrong in (0, -1):
        with pytest.raises(ValueError, match="give how many keys a query may list on average, such as 800"):
            CalibrationSettings(pairs=wrong)


def test_the_command_takes_a_tolerance_or_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def tell(options: CalibrateOptions) -> None:
        raise ValueError(f"tolerance {options.settings.tolerance}, pairs {options.settings.pairs}")

    monkeypatch.setattr("hyperattention.report.calibrate.ready", tell)
    for arguments, wanted in (
        ((), "tolerance 0.05, pairs None"),
        (("--tolerance", 0.1), "tolerance 0.1, pairs None"),
        (("--pairs", 800), "tolerance None, pairs 800"),
        (("--pairs", 800, "--tolerance", 0.1), "tolerance 0.1 and pairs 800: give one"),
        (("--pairs", 0), "pairs 0: give how many keys"),
    ):
        code, output = invoke("calibrate", "--out", tmp_path / "plan.json", *arguments)
        assert (code, wanted in " ".join(output.split())) == (2, True), output
