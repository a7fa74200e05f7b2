"""Calibration measures, chooses, resumes and says what it did; inspect draws it on a page that loads nothing."""

import html.parser
import json
import math
import re
import shutil
import statistics
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import hyperattention as ha
from assertions import assert_exact
from hyperattention.calibration.candidates import candidates
from hyperattention.calibration.choose import choose
from hyperattention.calibration.measure import Measurement, measure_layer
from hyperattention.files.timed import Crossing
from tiny_models import LENGTH, NUM_LAYERS, build, tokens

pytest.importorskip("transformers")
from rich.console import Console

from hyperattention.calibration import calibrate as calibration
from hyperattention.calibration.calibrate import calibrate, steps_of
from hyperattention.calibration.head_statistics import inspect_layer
from hyperattention.calibration.settings import CalibrationSettings
from hyperattention.reference.model import LoadedModel, load_reference
from hyperattention.reference.passes import watch_exact
from hyperattention.reference.samples import EvaluationSample
from hyperattention.report import inspect as page
from hyperattention.report.calibrate import conclude
from hyperattention.report.demo import PreparedDemo
from hyperattention.report.maps import error_against_time
from hyperattention.report.method_names import short_name
from test_cli import invoke

NARROW = ha.Method(ha.Sinks(4), ha.Window(16))
DRAWN = ha.Method(ha.Sinks(4), ha.Window(16), ha.Draw(64))
WIDE = ha.Method(ha.Sinks(4), ha.Window(4096))
LADDER = (ha.Exact(), NARROW, DRAWN, WIDE)


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return LoadedModel(build("Llama", {}), "a tiny model")


@pytest.fixture(scope="module")
def samples() -> tuple[EvaluationSample, ...]:
    both = tokens(2)
    counted = torch.arange(1, LENGTH) >= LENGTH // 2
    return tuple(EvaluationSample(each, counted, int(counted.sum()), torch.zeros_like(counted)) for each in both)


def measurement(layer: int, errors: list[list[float]], seconds: tuple[float, ...], document: int = 0) -> Measurement:
    return Measurement(document, layer, (4, 2, 16, 16), seconds, tuple(map(tuple, errors)))


def test_the_quickest_candidate_within_the_tolerance_is_chosen() -> None:
    errors = [[0.0, 0.0], [0.04, 0.5], [0.02, 0.3], [0.01, 0.2]]
    slow_wide = measurement(0, errors, (9.0, 1.0, 3.0, 20.0))
    ((method, found),) = choose([slow_wide], LADDER, 0.05).values()
    assert (method, found) == (ha.ByHead((NARROW, ha.Exact())), (0.04, 0.0))
    ((method, _),) = choose([slow_wide], LADDER, 0.03).values()
    assert method == ha.ByHead((DRAWN, ha.Exact()))
    ((method, _),) = choose([slow_wide], LADDER, 0.25).values()
    # within the tolerance, but slower than exact attention
    assert method.methods[1] == ha.Exact()
    broken = [[0.0, 0.0], [math.nan, math.inf], [math.nan, math.inf], [math.nan, math.inf]]
    ((method, _),) = choose([measurement(0, broken, (9.0, 1.0, 1.0, 1.0))], LADDER, 0.9).values()
    assert method == ha.ByHead((ha.Exact(), ha.Exact()))


def test_of_equally_quick_candidates_the_one_of_fewest_pairs_is_chosen() -> None:
    errors = [[0.0, 0.0], [0.01, 0.01], [0.01, 0.01], [0.01, 0.01]]
    ((method, _),) = choose([measurement(0, errors, (9.0, 1.1, 1.0, 1.0))], LADDER, 0.05).values()
    assert method == ha.ByHead((NARROW, NARROW))
    ((method, _),) = choose([measurement(0, errors, (9.0, 1.5, 1.0, 9.0))], LADDER, 0.05).values()
    assert method == ha.ByHead((DRAWN, DRAWN))


def test_candidates_within_a_quarter_of_the_quickest_count_as_equally_quick() -> None:
    errors = [[0.0, 0.0], [0.01, 0.01], [0.01, 0.01], [0.01, 0.01]]
    for seconds, wanted in ((1.24, NARROW), (1.25, NARROW), (1.26, DRAWN)):
        ((method, _),) = choose([measurement(0, errors, (9.0, seconds, 1.0, 9.0))], LADDER, 0.05).values()
        assert method == ha.ByHead((wanted, wanted))
    # an error just at the tolerance is allowed
    at = [[0.0, 0.0], [0.05, 0.05 + 1e-9], [0.5, 0.5], [0.5, 0.5]]
    ((method, _),) = choose([measurement(0, at, (9.0, 1.0, 1.0, 1.0))], LADDER, 0.05).values()
    assert method == ha.ByHead((NARROW, ha.Exact()))


def test_the_worst_document_decides_and_layers_of_a_shape_share_their_times() -> None:
    good = [[0.0, 0.0], [0.01, 0.01], [0.01, 0.01], [0.01, 0.01]]
    # above the tolerance, while the mean of both documents is below it
    bad = [[0.0, 0.0], [0.08, 0.01], [0.01, 0.01], [0.01, 0.01]]
    times = (9.0, 1.0, 2.0, 20.0)
    found = choose([measurement(0, good, times), measurement(0, bad, times, document=1)], LADDER, 0.05)
    assert found[0][0] == ha.ByHead((DRAWN, NARROW))
    # one layer's time was disturbed
    found = choose(
        [measurement(0, good, (9.0, 99.0, 2.0, 20.0)), *(measurement(i, good, times) for i in (1, 2))], LADDER, 0.05
    )
    assert {method for method, _ in found.values()} == {ha.ByHead((NARROW, NARROW))}


def test_candidates_list_fewer_pairs_than_exact_attention_and_hold_the_default() -> None:
    assert candidates(64) == (ha.Exact(),)
    ladder = candidates(8192)
    assert isinstance(ladder[0], ha.Exact)
    assert ha.default_method(8192) in ladder
    assert len(set(ladder)) == len(ladder)
    assert all(method.cost(8192).share_of_exact < 1 for method in ladder[1:])


def test_a_calibrated_plan_keeps_its_promises(
    loaded: LoadedModel, samples: tuple[EvaluationSample, ...], tmp_path: Path
) -> None:
    steps: list[str] = []
    plan = calibrate(loaded, samples, CalibrationSettings(0.3, ladder=LADDER, repeats=1), tmp_path / "journal", steps.append)
    assert list(plan.layers) == list(range(NUM_LAYERS))
    assert len(steps) == steps_of(loaded, samples)
    assert all(0 <= error <= 0.3 for errors in plan.errors.values() for error in errors)
    assert plan.measured.length == LENGTH
    assert plan.measured.pairs_per_query == plan.method.cost(LENGTH).pairs
    words = " ".join(conclude(plan))
    assert re.search(r"the plan adds .* error of every head is at most 0\.3 with all other layers exact", words)
    assert plan.payoff() in words
    assert [each.length for each in plan.measured.times] == [256, LENGTH]
    assert plan.crossover == Crossing(plan.measured.times).keys
    # every candidate but exact attention is hopeless at a tolerance near 0
    strict = calibrate(loaded, samples, CalibrationSettings(1e-9, ladder=LADDER[:3], repeats=1), tmp_path / "strict")
    assert set(strict.layers.values()) == {ha.ByHead((ha.Exact(), ha.Exact()))}
    assert strict.measured.added_nats == 0
    # what is exact everywhere is not timed against itself, and is not faster
    assert {each.ratio for each in strict.measured.times} == {1.0}
    assert strict.crossover is None


def test_errors_are_those_of_all_rows_of_the_worst_query_head(
    loaded: LoadedModel, samples: tuple[EvaluationSample, ...]
) -> None:
    calls: list = []
    watch_exact(loaded, samples[0], calls.append)
    found = measure_layer(calls[1], LADDER, 1, 5)
    assert (found.document, found.layer, found.shape) == (1, 1, (4, 2, 16, 16))
    assert all(seconds > 0 for seconds in found.seconds)
    shape = {"is_causal": True, "enable_gqa": True, "layer": 1, "seed": 6, "scale": calls[1].scale}
    exact, drawn = (
        ha.attention(calls[1].q, calls[1].k, calls[1].v, method=method, **shape) for method in (ha.Exact(), DRAWN)
    )
    rows = (drawn - exact).norm(dim=-1) / exact.norm(dim=-1)
    heads = rows[0].mean(-1).tolist()
    assert_exact(torch.tensor(found.errors[2]), torch.tensor((max(heads[:2]), max(heads[2:]))), size=1.0)
    assert found.errors[0] == (0.0, 0.0)
    assert found.errors[1] > found.errors[2]


@pytest.mark.slow
def test_a_page_says_that_its_plan_does_not_run(
    loaded: LoadedModel, samples: tuple[EvaluationSample, ...], tmp_path: Path
) -> None:
    plan = calibrate(loaded, samples, CalibrationSettings(0.3, ladder=LADDER, repeats=1), tmp_path / "journal")
    options = page.InspectOptions(plan=Path("plan.json"), rows=32, ladder=LADDER)
    prepared = PreparedDemo(options.texts, loaded, samples, "text")
    layers = page.run(page.PreparedInspection(options, prepared, plan), Console(quiet=True))

    def text_under(crossover: int | None) -> str:
        page.save(
            page.PreparedInspection(options, prepared, replace(plan, crossover=crossover)), layers, tmp_path / "page.html"
        )
        return (tmp_path / "page.html").read_text()

    slow, long, paying = map(text_under, (None, LENGTH + 1, LENGTH))
    assert "The plan was not faster than exact attention where it was calibrated" in slow
    assert f"the plan is faster from {LENGTH + 1} keys on" in long
    assert "keys on" not in paying.split("<main>")[0].split("<body>")[1]


class Interrupted(Exception):
    pass


def test_an_interrupted_calibration_goes_on_where_it_stopped(
    loaded: LoadedModel, samples: tuple[EvaluationSample, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal, settings, measured = tmp_path / "journal", CalibrationSettings(0.3, ladder=LADDER, repeats=1), []
    whole = calibration.measure_layer

    def stop_after(count: int):
        def measure(call, ladder, document, seed) -> Measurement:
            if len(measured) == count:
                raise Interrupted
            measured.append((document, call.layer))
            return whole(call, ladder, document, seed)

        monkeypatch.setattr(calibration, "measure_layer", measure)

    stop_after(1)
    with pytest.raises(Interrupted):
        calibrate(loaded, samples, settings, journal)
    # killed in the middle of a line
    with journal.open("a") as file:
        file.write('{"document": 0, "layer": 1, "sec')
    stop_after(4)
    calibrate(loaded, samples, settings, journal)
    assert measured == [(0, 0), (0, 1), (1, 0), (1, 1)]
    # another tolerance rests on the same measurements, another seed does not
    calibrate(loaded, samples, replace(settings, tolerance=0.1), journal)
    kept = journal.read_text()
    with pytest.raises(ValueError, match="seed 0 there and 1 here"):
        calibrate(loaded, samples, replace(settings, seed=1), journal)
    assert journal.read_text() == kept
    with pytest.raises(Interrupted):
        calibrate(loaded, samples, replace(settings, seed=1), tmp_path / "another")
    # the model is what it was
    assert loaded.model.config._attn_implementation == "sdpa"


def test_settings_and_models_that_cannot_be_calibrated_are_refused(
    samples: tuple[EvaluationSample, ...], tmp_path: Path
) -> None:
    for wrong in (0.0, 1.0, math.nan):
        with pytest.raises(ValueError, match="give a relative error between 0 and 1"):
            CalibrationSettings(wrong)
    with pytest.raises(ValueError, match="put Exact"):
        CalibrationSettings(ladder=(NARROW,))
    windowed = LoadedModel(build("Mistral", {"sliding_window": 48}), "a windowed model")
    with pytest.raises(ValueError, match="no attention call of a windowed model can be approximated"):
        calibrate(windowed, samples, CalibrationSettings(ladder=LADDER), tmp_path / "journal")
    with pytest.raises(ValueError, match="no text"):
        calibrate(windowed, (), CalibrationSettings(), tmp_path / "journal")


def test_row_figures_are_those_of_the_softmax_rows(loaded: LoadedModel, samples: tuple[EvaluationSample, ...]) -> None:
    calls: list = []
    watch_exact(loaded, samples[0], calls.append)
    assert [call.layer for call in calls] == list(range(NUM_LAYERS))
    shown = inspect_layer(calls[1], ha.ByHead((NARROW, DRAWN)), LADDER, rows=LENGTH)
    q, k = calls[1].q[0], calls[1].k[0].repeat_interleave(2, 0)
    scores = (q @ k.transpose(1, 2) * calls[1].scale).masked_fill(~torch.ones(LENGTH, LENGTH).tril().bool(), -math.inf)
    weights = scores.double().softmax(-1)
    key, row = torch.arange(LENGTH), torch.arange(LENGTH)[:, None]
    far = (key >= 16) & (key <= row - 256)
    entropy = torch.distributions.Categorical(weights).entropy().mean(1)
    for name, wanted in (
        ("entropy", entropy),
        ("sinks", weights[..., :16].sum(-1).mean(1)),
        ("far", (weights * far).sum(-1).mean(1)),
        ("window", (weights * ((key >= 16) & (key > row - 256))).sum(-1).mean(1)),
    ):
        # shares are sums of weights, which add up to one
        assert_exact(torch.tensor(shown.figures[name]), wanted, size=max(1.0, wanted.max().item()))
    assert shown.methods == (NARROW, DRAWN)
    assert shown.shares == [method.cost(LENGTH).share_of_exact for method in (NARROW, NARROW, DRAWN, DRAWN)]
    assert all(error > 0 for error in shown.figures["error"])


def test_the_star_is_measured_like_the_dots(loaded: LoadedModel, samples: tuple[EvaluationSample, ...]) -> None:
    calls: list = []
    watch_exact(loaded, samples[0], calls.append)
    served = (ha.ByHead((NARROW, NARROW)), ha.ByHead((NARROW, DRAWN)))
    layers = [inspect_layer(call, each, LADDER, rows=32) for call, each in zip(calls, served, strict=True)]
    # heads draw what they would have drawn had all run that method, so errors are the candidates' own
    for layer in layers:
        places = [layer.ladder.index(method) for method in layer.methods]
        own = [layer.measured.errors[place][head] for head, place in enumerate(places)]
        assert_exact(torch.tensor(layer.measured.errors[-1]), torch.tensor(own), size=1.0)
    star = error_against_time(layers, "plan").data[-1]
    assert star.name == "plan"
    assert star.y[0] == pytest.approx(statistics.fmean(x for layer in layers for x in layer.measured.errors[-1]))
    assert star.x[0] == pytest.approx(statistics.fmean(1000 * layer.measured.seconds[-1] for layer in layers))
    # served by one method everywhere, the star lies at the height of that method's dot
    alike = [inspect_layer(call, served[0], LADDER, rows=32) for call in calls]
    figure = error_against_time(alike, "plan")
    shown = [trace for trace in figure.data[:-1] if trace.visible is True]
    dots = {text: y for trace in shown for text, y in zip(trace.text, trace.y, strict=True)}
    assert len(dots) == len(LADDER)
    assert_exact(torch.tensor(figure.data[-1].y[0]), torch.tensor(dots[short_name(NARROW)]), size=1.0)


class Loads(html.parser.HTMLParser):
    """Everything that a page would load."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("src", "srcset", "href", "data", "action") and not str(value).startswith("data:"):
                self.found.append(f"{tag} {name}={value}")


@pytest.fixture(scope="module")
def report(loaded: LoadedModel, samples: tuple[EvaluationSample, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    # a name that would end a script, and a heading, were it not escaped
    named = replace(loaded, name="</script><h1>tiny & small")
    options = page.InspectOptions(rows=32, ladder=LADDER)
    ready = page.PreparedInspection(options, PreparedDemo(options.texts, named, samples, "</title>text"), None)
    layers = page.run(ready, Console(quiet=True))
    assert [layer.layer for layer in layers] == list(range(NUM_LAYERS))
    path = tmp_path_factory.mktemp("report") / "report.html"
    page.save(ready, layers, path)
    return path


def test_the_page_is_whole_and_loads_nothing(report: Path) -> None:
    text = report.read_text()
    loads = Loads()
    loads.feed(text)
    assert loads.found == []
    loads.feed('<script src="https://example.org/x.js"></script>')
    assert len(loads.found) == 1
    assert not re.search(r"@import|url\(\s*['\"]?http", text.split("<script>")[0])
    headings = re.findall(r"<section.*?<h2>(.*?)</h2><p>(.+?)</p>", text)
    assert len(headings) == 11
    assert text.count("<h1>") == 1
    assert "&lt;/script&gt;&lt;h1&gt;tiny &amp; small" in text


@pytest.mark.skipif(
    shutil.which("chromium") is None, reason="needs chromium on the path, to open the page as a person would"
)
def test_a_browser_draws_every_figure_without_a_request(report: Path, tmp_path: Path) -> None:
    flags = (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--host-resolver-rules=MAP * ~NOTFOUND",
        "--enable-logging=stderr",
    )
    done = subprocess.run(
        ["chromium", *flags, f"--user-data-dir={tmp_path}", "--virtual-time-budget=20000", "--dump-dom", report.as_uri()],
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    assert done.stdout.count('class="plot-container plotly"') == 11
    assert "CONSOLE" not in done.stderr
    assert "NAME_NOT_RESOLVED" not in done.stderr


@pytest.mark.heavy  # the reference model reads a short text with every candidate
def test_the_commands_from_end_to_end(tmp_path: Path) -> None:
    plan, out = tmp_path / "plan.json", tmp_path / "report.html"
    short = ("--length", 1024)
    code, output = invoke("calibrate", "reference", "--tolerance", 0.2, "--documents", 1, *short, "--out", plan)
    assert code == 0, output
    assert "fewer pairs than exact attention" in output
    assert [each.name for each in tmp_path.iterdir()] == ["plan.json"]
    loaded = ha.load_plan(plan)
    loaded.check(load_reference().model)
    code, output = invoke("inspect", *short, "--plan", plan, "--out", out)
    assert code == 0, output
    assert "With the plan plan.json" in out.read_text()
    other = json.loads(plan.read_text())
    other["model"]["weights"] = "0" * 64
    plan.write_text(json.dumps(other))
    cases = (
        (("inspect", "--plan", plan), "other weights in the same shape"),
        (("inspect", "--plan", tmp_path / "none.json"), "cannot read the plan"),
        (("calibrate", tmp_path / "nowhere"), "no directory"),
        (("calibrate", "--tolerance", 2, "--out", tmp_path / "other.json"), "between 0 and 1"),
        (("calibrate", "--out", tmp_path / "no" / "plan.json"), "cannot write"),
    )
    for arguments, message in cases:
        code, output = invoke(*arguments)
        assert (code, message in output) == (2, True), output
