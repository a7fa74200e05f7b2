"""From where a plan pays is decided by medians of rounds in turn, doubted where the rounds disagree, and measured again."""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import hyperattention as ha
from hyperattention.bench.timing import Timing
from hyperattention.files.fingerprint import fingerprint
from hyperattention.files.plan import Measured
from hyperattention.files.timed import Crossing, Timed
from tiny_models import LENGTH, build, tokens

pytest.importorskip("transformers")
from hyperattention.calibration import crossover
from hyperattention.calibration.crossover import find_crossing
from hyperattention.calibration.retime import retime
from hyperattention.integrations.transformers import use
from hyperattention.reference.model import LoadedModel
from hyperattention.reference.samples import EvaluationSample
from hyperattention.report.calibrate import conclude
from test_cli import invoke

LENGTHS = (256, 512, 1024, 2048)
NARROW = ha.ByHead((ha.Method(ha.Sinks(4), ha.Window(16)), ha.Exact()))


def crossing(ratios: tuple[float, ...], lowest: tuple[float, ...] = (), highest: tuple[float, ...] = ()) -> Crossing:
    spreads = zip(LENGTHS, ratios, lowest or ratios, highest or ratios, strict=True)
    return Crossing(tuple(Timed(length, 1.0, ratio, low, high) for length, ratio, low, high in spreads))


def planned(model: nn.Module, found: Crossing) -> ha.Plan:
    last = found.times[-1]
    measured = Measured(
        last.length, 2, "ab", 0, "cpu: some", 2, {"torch": "2"}, 60.0, 160.5, last.plan, last.exact, 0.001, found.times
    )
    return ha.Plan(fingerprint(model), {0: NARROW}, {0: (0.125, 0.0)}, 0.25, found.keys, measured)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    model = build("Llama", {})
    model.set_attn_implementation("sdpa")
    return model


@pytest.fixture(scope="module")
def sample() -> EvaluationSample:
    counted = torch.arange(1, LENGTH) >= LENGTH // 2
    return EvaluationSample(tokens(1)[0], counted, int(counted.sum()), torch.zeros_like(counted))


def test_a_plan_pays_from_where_it_is_always_faster() -> None:
    cases = {(0.8, 1.5, 1.5, 1.5): 512, (1.5, 0.5, 1.5, 1.5): 1024, (1.5,) * 4: 256, (0.5, 0.5, 0.5, 1.5): 2048}
    for ratios, keys in cases.items():
        assert crossing(ratios).keys == keys
        assert crossing(ratios).sure
    # not faster at the full length: it never pays, whatever it did on shorter ones
    for ratios in ((0.5,) * 4, (1.5, 1.5, 1.5, 0.5), (1.0,) * 4):
        assert crossing(ratios).keys is None
        assert len(crossing(ratios).describe()) == 1


def test_rounds_that_disagree_are_told() -> None:
    noisy = crossing((0.5, 0.8, 1.5, 0.9), (0.4, 0.7, 1.2, 0.6), (0.6, 0.9, 2.0, 1.4))
    assert (noisy.keys, noisy.earliest, noisy.latest) == (None, 1024, None)
    found, warning = noisy.describe()
    assert "1 s and exact attention 0.9 s (0.90x as fast; 0.60x to 1.40x over the rounds)" in found
    assert "from 1,024 keys on by its best rounds, nowhere by its worst" in warning
    assert "`hyperattention retime`" in warning
    paying = crossing((0.5, 0.9, 1.1, 1.5), (0.4, 0.7, 0.9, 1.2), (0.6, 1.1, 1.3, 2.0))
    assert (paying.keys, paying.earliest, paying.latest) == (1024, 512, 2048)
    assert "from 512 keys on by its best rounds, from 2,048 keys on by its worst" in paying.describe()[1]
    # noise that changes nothing is no reason to warn: the plan is slower at the next length whatever the rounds say
    harmless = crossing((0.9, 0.5, 1.1, 1.5), (0.8, 0.4, 1.05, 1.2), (1.1, 0.6, 1.3, 2.0))
    assert harmless.sure


def test_a_plan_says_what_was_measured(model: nn.Module) -> None:
    slow, sure, noisy = (
        planned(model, crossing(ratios, low, high))
        for ratios, low, high in (
            ((0.5,) * 4, (0.4,) * 4, (0.6,) * 4),
            ((0.8, 1.5, 1.5, 1.5), (0.7, 1.2, 1.2, 1.2), (0.9, 1.6, 1.6, 1.6)),
            ((0.5,) * 4, (0.4,) * 4, (1.6,) * 4),
        )
    )
    assert "At 2,048 tokens its attention took 1 s and exact attention 0.5 s (0.50x as fast" in slow.payoff()
    assert "It was not faster, so `use` runs exact attention instead; `hyperattention retime` times it" in slow.payoff()
    assert "Timed on cpu: some, threads: 2." in slow.payoff()
    assert "It is faster from 512 keys on" in sure.payoff()
    assert "WARNING" not in slow.payoff() + sure.payoff()
    assert "WARNING: the rounds disagree" in noisy.payoff()
    assert noisy.payoff() in conclude(noisy)
    # a plan of an earlier release tells the two times it has
    old = replace(slow, measured=replace(slow.measured, times=()))
    assert "At 2,048 tokens its attention took 1 s and exact attention 0.5 s (0.50x as fast)." in old.payoff()


def test_use_says_why_a_plan_did_not_run(model: nn.Module) -> None:
    plan = planned(model, crossing((0.5,) * 4))
    said = r"the plan was not faster than exact attention \(1 call\).*took 1 s and exact attention 0\.5 s"
    with pytest.warns(UserWarning, match=said), use(model, plan):
        model(tokens(1))


def test_one_slow_round_does_not_decide(model: nn.Module, sample: EvaluationSample, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    def interleave(calls: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, Timing]:
        order.extend(calls)
        # the machine was busy in the second round of one layer while the plan ran, in the third while exact attention did
        return {"exact": Timing((2.0, 2.0, 9.0)[:repeats]), "plan": Timing((1.0, 9.0, 1.0)[:repeats])}

    monkeypatch.setattr(crossover, "interleave", interleave)
    found = find_crossing(LoadedModel(model, "tiny"), sample, {0: NARROW, 1: NARROW}, repeats=3, on_step=lambda _: None)
    assert found.times == tuple(Timed(length, 2.0, 4.0, 4 / 18, 18 / 2) for length in (256, LENGTH))
    assert (found.keys, found.sure) == (256, False)
    assert order == ["exact", "plan"] * 4
    with pytest.raises(ValueError, match=r"no attention call of the layers \[7\] can be approximated"):
        find_crossing(LoadedModel(model, "tiny"), sample, {7: NARROW}, repeats=3, on_step=lambda _: None)


def test_retiming_changes_the_times_alone(
    model: nn.Module, sample: EvaluationSample, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = LoadedModel(model, "tiny")
    plan = planned(model, crossing((0.5,) * 4))
    plan = replace(plan, measured=replace(plan.measured, length=LENGTH))
    faster = Crossing((Timed(LENGTH, 1.0, 3.0, 2.0, 4.0),))
    monkeypatch.setattr("hyperattention.calibration.retime.find_crossing", lambda *_, **__: faster)
    again = retime(plan, loaded, sample)
    assert (again.crossover, again.measured.seconds, again.measured.exact_seconds) == (LENGTH, 1.0, 3.0)
    assert again.measured.times == faster.times
    assert again.measured.threads == torch.get_num_threads()
    assert again.measured.device != "cpu: some"
    assert replace(again, crossover=None, measured=plan.measured) == plan
    with pytest.raises(ValueError, match="a text of 320 tokens for a plan calibrated at 2,048"):
        retime(planned(model, crossing((0.5,) * 4)), loaded, sample)
    with pytest.raises(ValueError, match="made for another model"):
        retime(plan, LoadedModel(build("Qwen2", {}), "another"), sample)


def test_times_survive_the_file_and_wrong_ones_are_refused(model: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    plan = planned(model, crossing((0.5,) * 4, (0.4,) * 4, (0.6,) * 4))
    ha.save_plan(plan, path)
    assert ha.load_plan(path) == plan
    whole = json.loads(path.read_text())
    # as an earlier release wrote it
    times = whole["measured"].pop("times")
    path.write_text(json.dumps(whole))
    assert ha.load_plan(path).measured == replace(plan.measured, times=())
    for wrong, message in (
        (7, "measured.times is 7: it must be a list"),
        ([times[0] | {"plan": 0}], "measured.times.0.plan is 0: it must be a finite number"),
        ([times[0] | {"length": 0}], "measured.times.0.length is 0: it must be a whole number"),
        ([{"length": 3}], "measured.times.0.plan is missing"),
        (times[::-1], "lengths must rise"),
        ([times[0], times[0]], "lengths must rise"),
    ):
        whole["measured"]["times"] = wrong
        path.write_text(json.dumps(whole))
        with pytest.raises(ValueError, match=message):
            ha.load_plan(path)


@pytest.fixture
def short_plan(tmp_path: Path) -> Path:
    from hyperattention.reference.model import load_reference

    plan = planned(load_reference().model, crossing((0.5,) * 4))
    path = tmp_path / "slow.json"
    ha.save_plan(replace(plan, measured=replace(plan.measured, length=128)), path)
    return path


@pytest.mark.slow  # the reference model is loaded, and reads a short text
def test_the_command_times_a_plan_again(short_plan: Path, tmp_path: Path) -> None:
    before, out = ha.load_plan(short_plan), tmp_path / "again.json"
    code, output = invoke("retime", short_plan, "--out", out)
    assert code == 0, output
    assert "Before: At 2,048 tokens" in output
    assert "Now: At 128 tokens" in output
    assert "retime: finished" in output
    assert ha.load_plan(short_plan) == before
    after = ha.load_plan(out)
    assert [each.length for each in after.measured.times] == [128]
    assert after.layers == before.layers
    # in place of the old one only where that is asked for
    code, output = invoke("retime", short_plan)
    assert (code, "--overwrite" in output) == (2, True), output
    code, output = invoke("retime", short_plan, "--overwrite")
    assert code == 0, output
    assert ha.load_plan(short_plan).measured.times[0].length == 128
    assert [each.name for each in sorted(tmp_path.iterdir())] == ["again.json", "slow.json"]
    code, output = invoke("retime", tmp_path / "none.json")
    assert (code, "cannot read the plan" in output) == (2, True), output
