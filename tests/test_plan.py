"""A plan survives its file, is refused where the file or the model is wrong, and runs what it says in every head."""

import copy
import inspect
import json
import pickle
from collections.abc import Callable, Iterator
from dataclasses import MISSING, fields, replace
from pathlib import Path

import pytest
import torch
from torch import nn

import hyperattention as ha
from assertions import assert_exact
from cases import CASES
from front_door import with_error, with_lse
from hyperattention import select
from hyperattention.files.fields import Field
from hyperattention.files.fingerprint import fingerprint
from hyperattention.files.method_table import METHODS, method_from_json, method_to_json
from hyperattention.files.plan import Measured
from hyperattention.files.policy_table import POLICIES, policy_to_json
from hyperattention.policies.cluster_means import ClusterMeans
from policies import POLICIES as POLICY_CASES
from tiny_models import LENGTH, NUM_LAYERS, build, tokens

pytest.importorskip("transformers")
from hyperattention.integrations.transformers import use

NARROW = ha.Method(ha.Sinks(4), ha.Window(16), tile=32)
DRAWN = ha.Method(ha.Sinks(4), ha.Window(16), ha.Draw(24, by=ha.HierarchicalSearch()))
MEASURED = Measured(LENGTH, 2, "ab", 0, "cpu: some", 1, {"torch": "2"}, 60.0, 160.5, 0.5, 1.0, -0.001)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    model = build("Llama", {})
    model.set_attn_implementation("sdpa")
    return model


def make(model: nn.Module, layers: dict[int, ha.ByHead], crossover: int | None = 0) -> ha.Plan:
    errors = {layer: tuple(0.125 for _ in method.methods) for layer, method in layers.items()}
    return ha.Plan(fingerprint(model), layers, errors, 0.25, crossover, MEASURED)


@pytest.fixture
def plan(model: nn.Module) -> ha.Plan:
    return make(model, {0: ha.ByHead((NARROW, ha.Exact())), 1: ha.ByHead((DRAWN, NARROW))})


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_method_survives_json(case) -> None:
    text = json.dumps(method_to_json(case.method))
    assert method_from_json(Field(json.loads(text), "file", "methods", "again")) == case.method


# the form in which files keep a method; a change of it needs a new version of plan files
WRITTEN = """{"type": "Method", "stages": [{"type": "Sinks", "num": 16}, {"type": "Window", "size": 256},
{"type": "Draw", "num": 64, "by": {"type": "Mix", "parts": [[{"type": "Uniform"}, 0.25], [{"type": "HierarchicalSearch",
"levels": [{"type": "Level", "block_size": 256, "keep": 32, "by": {"type": "Representatives", "means": 4, "far": 8}}],
"dim": 64, "pooled": 16, "uniform_share": 0.2}, 0.75]]}}], "tile": 32}"""


def test_a_method_is_written_in_the_form_that_files_keep() -> None:
    level = select.Level(256, 32, select.Representatives(4, 8))
    mix = select.Mix((ha.Uniform(), 0.25), (ha.HierarchicalSearch((level,)), 0.75))
    method = ha.Method(ha.Sinks(16), ha.Window(256), ha.Draw(64, mix), tile=32)
    assert method_from_json(Field(json.loads(WRITTEN), "file", "methods", "again")) == method
    assert method_to_json(method) == json.loads(WRITTEN)


def parts_of(value: object) -> Iterator[dict[str, object]]:
    """List the objects of a file, the outermost first."""
    if isinstance(value, list):
        for each in value:
            yield from parts_of(each)
    elif isinstance(value, dict):
        yield value
        yield from parts_of([*value.values()])


def default_of(kind: type, name: str) -> object:
    (each,) = (each for each in fields(kind) if each.name == name)
    return inspect.signature(kind).parameters[name].default if each.default_factory is MISSING else each.default_factory()


def test_what_a_file_leaves_out_is_the_default_of_the_constructor() -> None:
    written = [(METHODS, method_to_json(case.method)) for case in CASES]
    written += [(POLICIES, policy_to_json(case.policy)) for case in POLICY_CASES]
    optional, required = set(), set()
    for table, part in [(table, part) for table, whole in written for part in parts_of(whole)]:
        kind = table.by_name[str(part["type"])]
        has_default = {each.name: each.default is not each.empty for each in inspect.signature(kind).parameters.values()}
        shortest = {name: value for name, value in part.items() if not has_default.get(name)}
        read = table.read(Field(shortest, "file", "part", "again"))
        for name in has_default:
            if has_default[name]:
                optional.add((kind, name))
                assert getattr(read, name) == default_of(kind, name)
            else:
                required.add((kind, name))
                with pytest.raises(ValueError, match=rf"part\.{name} is missing"):
                    table.read(Field({key: shortest[key] for key in shortest if key != name}, "file", "part", "again"))
    assert {(ha.Method, "tile"), (ha.Draw, "by"), (ClusterMeans, "latest")} <= optional
    assert {(ha.Method, "stages"), (select.Mix, "parts"), (ha.Draw, "num")} <= required


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_method_is_copied_and_printed_whole(case) -> None:
    method = case.method
    for again in (pickle.loads(pickle.dumps(method)), copy.deepcopy(method), eval(repr(method), dict(METHODS.by_name))):
        assert (again, hash(again), repr(again)) == (method, hash(method), repr(method))


def test_a_type_that_plans_do_not_know_is_refused_when_written() -> None:
    with pytest.raises(TypeError, match="add its type to the table"):
        method_to_json(ha.ByHead((NARROW,)))


def test_a_plan_survives_its_file(plan: ha.Plan, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text("what was there before")
    with pytest.raises(FileExistsError, match="exists: name another file, or give overwrite=True"):
        ha.save_plan(plan, path)
    assert path.read_text() == "what was there before"
    ha.save_plan(plan, path, overwrite=True)
    assert ha.load_plan(path) == plan
    assert [each.name for each in tmp_path.iterdir()] == ["plan.json"]
    # each distinct method stands there once
    assert len(json.loads(path.read_text())["methods"]) == 3
    never = replace(plan, crossover=None)
    ha.save_plan(never, path, overwrite=True)
    assert ha.load_plan(path) == never


def test_a_failed_write_leaves_the_old_plan(plan: ha.Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "plan.json"
    ha.save_plan(plan, path)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", stop)
        with pytest.raises(KeyboardInterrupt):
            ha.save_plan(replace(plan, crossover=7), path, overwrite=True)
    assert ha.load_plan(path) == plan
    unknown = replace(plan, layers={0: ha.ByHead((_Unknown(),))}, errors={0: (0.0,)})
    with pytest.raises(TypeError, match="cannot be kept in a file"):
        ha.save_plan(unknown, path, overwrite=True)
    assert ha.load_plan(path) == plan
    assert len(list(tmp_path.iterdir())) == 1


class _Unknown(ha.Exact):
    pass


def set_at(*path: object, value: object) -> Callable[[dict], None]:
    def change(data: dict) -> None:
        *way, last = path
        for name in way:
            data = data[name]
        if value is None:
            del data[last]
        else:
            data[last] = value

    return change


WRONG = {
    "another format": (set_at("format", value="recipe"), "format is 'recipe': it must be 'hyperattention plan'"),
    "another version": (set_at("version", value=2), "version is 2: this release reads version 1"),
    "no format": (set_at("format", value=None), "format is missing: the file is incomplete, or of another kind"),
    "no measurements": (set_at("measured", value=None), "measured is missing"),
    "an unknown field": (set_at("colour", value="red"), "colour is 'red': no such field is known"),
    "an unknown type": (set_at("methods", 0, "stages", 0, "type", value="Sink"), "stages.0.type is 'Sink': it must"),
    "a type of Python": (set_at("methods", 0, "type", value="Path"), "methods.0.type is 'Path': it must be one of"),
    "a stage as a method": (set_at("methods", 0, value={"type": "Sinks", "num": 4}), "methods.0 is {'type': 'Sinks'"),
    "no type": (set_at("methods", 0, "stages", 0, "type", value=None), "methods.0.stages.0.type is missing"),
    "no argument": (set_at("methods", 0, "stages", 0, "num", value=None), "methods.0.stages.0.num is missing"),
    "an unknown argument": (set_at("methods", 0, "stages", 0, "size", value=3), "Sinks has no such argument"),
    "a text for a number": (set_at("methods", 0, "stages", 0, "num", value="4"), "num is '4': Sinks takes a int here"),
    "a boolean for a number": (set_at("methods", 0, "stages", 0, "num", value=True), "num is True: Sinks takes a int here"),
    "a count of 0": (set_at("methods", 0, "stages", 0, "num", value=0), "num must be a positive integer"),
    "a stage for a density": (
        set_at("methods", 2, "stages", 2, "by", value={"type": "Window", "size": 3}), "Draw takes a Density here",
    ),
    "stages in the wrong order": (
        set_at("methods", 2, "stages", 0, value={"type": "Draw", "num": 4}), "would count keys twice",
    ),
    "a tile of 0": (set_at("methods", 0, "tile", value=0), "methods.0 is .*tile=0.: tile must be a positive integer"),
    "a density for a stage": (
        set_at("methods", 0, "stages", 0, value={"type": "Uniform"}), "methods.0.stages .* takes a list of Stage here",
    ),
    "no share of a density": (
        set_at("methods", 2, "stages", 2, "by", value={"type": "Mix", "parts": [[{"type": "Uniform"}]]}),
        "by.parts .* Mix takes a list of list of Density and float here",
    ),
    "a share of 0": (
        set_at("methods", 2, "stages", 2, "by", value={"type": "Mix", "parts": [[{"type": "Uniform"}, 0.0]]}),
        "every share above 0 and finite",
    ),
    "a method that is not there": (set_at("layers", "1", "methods", 0, value=7), "layers.1.methods.0 is 7: .* from 0 to 2"),
    "a layer that is not there": (set_at("layers", "2", value={}), "layers.2 is 2: it must be a whole number from 0 to 1"),
    "a layer without a number": (set_at("layers", "one", value={}), "layers.one is 'one'"),
    "too few heads": (set_at("layers", "1", "methods", value=[0]), r"layers.1.methods is \[0\]: it must have 2 entries"),
    "too few errors": (set_at("layers", "1", "errors", value=[0.1]), "layers.1.errors .* 2 entries, one for each kv head"),
    "an endless error": (set_at("layers", "1", "errors", 0, value=float("inf")), "layers.1.errors.0 is inf: .* finite"),
    "no number": (set_at("tolerance", value=float("nan")), "tolerance is nan: it must be a finite number"),
    "a negative crossover": (set_at("crossover", value=-1), "crossover is -1: it must be a whole number from 0 on"),
    "a crossover in words": (set_at("crossover", value="never"), "crossover is 'never': it must be a whole number"),
    "no crossover": (set_at("crossover", value=None), "crossover is missing"),
    "no layers": (set_at("layers", value={}), "layers is {}: it must name at least one layer"),
    "a list of layers": (set_at("layers", value=[1]), r"layers is \[1\]: it must be an object"),
    "a version of a package as a number": (set_at("measured", "versions", "torch", value=2), "measured.versions.torch is 2"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), WRONG.values(), ids=WRONG)
def test_a_wrong_file_is_refused_with_file_field_and_remedy(plan: ha.Plan, tmp_path: Path, change, message: str) -> None:
    path = tmp_path / "plan.json"
    ha.save_plan(plan, path)
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=message) as refused:
        ha.load_plan(path)
    assert str(refused.value).startswith(f"{path}: ")
    assert "`hyperattention calibrate` again" in str(refused.value)


def test_a_file_that_is_no_plan_is_refused(plan: ha.Plan, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    ha.save_plan(plan, path)
    whole = path.read_text()
    for text, message in (
        (whole[: len(whole) // 2], "not a complete JSON file"),
        ("", "not a complete JSON file"),
        ("[]", "it must be an object"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            ha.load_plan(path)
    path.write_bytes(b"\xff\xfe")
    for unreadable in (path, tmp_path, tmp_path / "none.json"):
        with pytest.raises(ValueError, match="cannot read the plan"):
            ha.load_plan(unreadable)


def test_each_head_runs_its_own_method() -> None:
    shape = {"is_causal": True, "enable_gqa": True, "layer": 1}
    q, k, v = (torch.randn(1, heads, 96, 16, generator=torch.Generator().manual_seed(heads)) for heads in (8, 4, 4))
    # heads of one method are not neighbours
    method = ha.ByLayer({1: ha.ByHead((NARROW, ha.Exact(), NARROW, ha.Exact()))})
    out = ha.attention(q, k, v, method=method, **shape)
    exact, lse = with_lse(q, k, v, method=ha.Exact(), **shape)
    narrow = ha.attention(q, k, v, method=NARROW, **shape)
    for heads in range(0, 8, 4):
        assert_exact(out[:, heads : heads + 2], narrow[:, heads : heads + 2])
        assert_exact(out[:, heads + 2 : heads + 4], exact[:, heads + 2 : heads + 4])
    both, own_lse = with_lse(q, k, v, method=method, **shape)
    assert_exact(both, out)
    assert_exact(own_lse[:, 2:4], lse[:, 2:4])
    assert (narrow - exact).abs().max() > 1e-2
    # a layer that is not named
    assert_exact(ha.attention(q, k, v, method=method, **shape | {"layer": 0}), exact)


def logits(model: nn.Module, length: int = LENGTH) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens(1)[:, :length]).logits


def test_use_runs_a_plan_and_counts_by_reason(model: nn.Module) -> None:
    plan = make(model, {0: ha.ByHead((ha.Exact(), ha.Exact())), 1: ha.ByHead((DRAWN, NARROW))}, crossover=200)
    reference = logits(model)
    with use(model, plan) as calls:
        planned = logits(model)
        logits(model, 199)
        logits(model, 1)
    assert calls.counts.approximated == 1
    assert calls.counts.exact == {"exact method": 1, "below the plan's crossover": 2, "single query": 2}
    assert (planned - reference).abs().max() > 1e-2
    with use(model, ha.ByLayer(plan.layers)) as calls:
        assert torch.equal(logits(model), planned)
    with use(model, make(model, {1: plan.layers[1]}), layers=[0, 1]) as calls:
        assert torch.equal(logits(model), planned)
    assert calls.counts.exact == {"layer not listed": 1}
    with pytest.warns(UserWarning, match="layer not listed"), use(model, plan, layers=[0]) as calls:
        logits(model)
    assert calls.counts.exact == {"exact method": 1, "layer not listed": 1}


def test_use_stays_exact_under_a_plan_that_was_not_faster(model: nn.Module) -> None:
    plan = make(model, {1: ha.ByHead((DRAWN, NARROW))}, crossover=None)
    assert not plan.pays(10**9)
    reference = logits(model)
    with pytest.warns(UserWarning, match="no attention call was approximated"), use(model, plan) as calls:
        unchanged = logits(model)
    assert torch.equal(unchanged, reference)
    assert calls.counts.exact == {"layer not listed": 1, "the plan was not faster than exact attention": 1}
    # asked for by method, it runs all the same
    with use(model, plan.method, layers=[1]) as calls:
        assert (logits(model) - reference).abs().max() > 1e-2
    assert calls.counts.approximated == 1


def test_by_layer_tells_the_standard_errors_of_its_layers() -> None:
    shape = {"is_causal": True, "enable_gqa": True}
    q, k, v = (torch.randn(1, heads, 96, 16, generator=torch.Generator().manual_seed(heads)) for heads in (4, 2, 2))
    by_head = ha.ByHead((DRAWN, ha.Exact()))
    method = ha.ByLayer({1: by_head, 2: NARROW})
    out, error = with_error(q, k, v, method=method, layer=1, **shape)
    own_out, own_error = with_error(q, k, v, method=by_head, layer=1, **shape)
    assert torch.equal(out, own_out)
    assert torch.equal(error, own_error)
    assert error[:, :2].max() > 0
    # a layer that is not named is exact
    assert not with_error(q, k, v, method=method, layer=0, **shape)[1].any()
    with pytest.raises(ValueError, match="drops keys"):
        with_error(q, k, v, method=method, layer=2, **shape)


def test_a_plan_of_another_model_is_refused(model: nn.Module, plan: ha.Plan) -> None:
    other_weights = build("Llama", {})
    with torch.no_grad():
        other_weights.model.layers[1].self_attn.k_proj.weight[-1, -1] += 0.5
    wider = build("Qwen2", {})
    cases = (
        (other_weights, "made for another model: other weights in the same shape"),
        (wider, "model class LlamaForCausalLM there and Qwen2ForCausalLM here"),
    )
    for other, message in cases:
        with pytest.raises(ValueError, match=message), use(other, plan):
            pass
    # its own, in another precision, in a wrapper, is still itself
    with use(nn.Sequential(build("Llama", {}).to(torch.bfloat16)), plan):
        pass


def test_a_model_without_values_has_no_fingerprint(model: nn.Module, plan: ha.Plan) -> None:
    empty, halfway = build("Llama", {}).to("meta"), build("Llama", {})
    halfway.model.layers[1].self_attn.k_proj.to("meta")
    for other in (empty, halfway):
        with pytest.raises(ValueError, match=r"weight .* has no values .* on the meta device.* load the model with its"):
            fingerprint(other)
        with pytest.raises(ValueError, match="has no values"), use(other, plan):
            pass


@pytest.mark.parametrize("tied", [False, True])
def test_an_offloaded_model_is_still_itself(tied: bool, tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate", reason="models are offloaded by accelerate, which no extra brings")
    model, offloaded, stored = (build("Llama", {"tie_word_embeddings": tied}) for _ in range(3))
    accelerate.cpu_offload(offloaded, execution_device="cpu")
    accelerate.disk_offload(stored, tmp_path, execution_device="cpu")
    for other in (offloaded, stored):
        assert fingerprint(other) == fingerprint(model)
        assert all(weight.is_meta for weight in other.parameters())


def test_by_layer_prints_pickles_and_costs(plan: ha.Plan) -> None:
    method = plan.method
    assert pickle.loads(pickle.dumps(method)) == method
    assert hash(method) == hash(plan.method)
    assert eval(repr(method), vars(ha) | vars(select)) == method
    assert method.cost(LENGTH).pairs == pytest.approx((52 + (LENGTH + 1) / 2 + DRAWN.cost(LENGTH).pairs + 52) / 4)
    assert not method.complete
    assert len(method.methods) == NUM_LAYERS
    for wrong, error in (({}, ValueError), ({-1: NARROW}, ValueError), ({0: method}, TypeError), ({0: 3}, TypeError)):
        with pytest.raises(error, match="ByLayer"):
            ha.ByLayer(wrong)
