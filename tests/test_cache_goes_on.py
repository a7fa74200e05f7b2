"""A compressed cache that is saved, copied, pickled or moved goes on bit for bit: the same tokens, and the same logits."""

import copy
import io
import pickle
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import hyperattention as ha
from hyperattention import policies
from policies import POLICIES
from tiny_models import build, tokens

transformers = pytest.importorskip("transformers")
integration = import_module("hyperattention.integrations.transformers")
file = import_module("hyperattention.integrations.transformers.cache_file")

PROMPT, STEPS = 60, 7
KEEPINGS = {
    "pages": policies.TopPages(page=4, by=policies.TwoLevels(policies.Bounds(0.5))),
    "pages and draws": policies.TopPages(page=4, by=policies.Midpoint(), draws=4, share=2, first=0),
    "subgen": policies.SubGen(delta=3.0, samples=2, value_samples=4, most_clusters=99),
    "look once": policies.LookOnce(keep=0.7, latest=4, pages=policies.TopPages(page=4)),
}
EVERY = {case.name: case.policy for case in POLICIES} | KEEPINGS
MODELS = {
    "llama": ("Llama", {}),
    "gemma2, windows and caps": ("Gemma2", {"sliding_window": 20, "attn_logit_softcapping": 5.0}),
    "gpt-oss, windows and sinks": ("GptOss", {"sliding_window": 20, "num_local_experts": 2, "num_experts_per_tok": 1}),
}
pytestmark = pytest.mark.filterwarnings("ignore:no attention call was approximated")


def model_of(name: str) -> nn.Module:
    kind, options = MODELS[name]
    model = build(kind, options)
    model.set_attn_implementation("eager")
    return model


@pytest.fixture
def model() -> nn.Module:
    return model_of("llama")


def read(model: nn.Module, policy: object = None, length: int = PROMPT, **options: object) -> object:
    room = {"budget": 40, "sinks": 2, "window": 16, "seed": 3}
    cache = integration.HyperCache(model.config, policy=policy, **(room | options))
    with torch.no_grad(), integration.use(model, ha.Exact()):
        model(tokens(2, length), past_key_values=cache)
    return cache


def go_on(model: nn.Module, cache: object, last: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Write on greedily: the tokens, and the logits that they follow from."""
    token = tokens(2, PROMPT)[:, -1:] if last is None else last
    written, logits = [], []
    with torch.no_grad(), integration.use(model, ha.Exact()):
        for _ in range(STEPS):
            logits.append(model(token, past_key_values=cache).logits[:, -1:])
            token = logits[-1].argmax(-1)
            written.append(token)
    return torch.cat(written, 1), torch.cat(logits, 1)


def assert_goes_on(model: nn.Module, ours: object, expected: object) -> None:
    (ours_text, ours_logits), (text, logits) = go_on(model, ours), go_on(model, expected)
    assert torch.equal(ours_text, text)
    assert torch.equal(ours_logits, logits)
    assert bool(logits.isfinite().all())


def through_file(cache: object, model: nn.Module, path: Path) -> object:
    file.save_cache(cache, model, path / "doc.safetensors", overwrite=True)
    return file.load_cache(path / "doc.safetensors", model)[0]


@pytest.mark.parametrize("policy", EVERY.values(), ids=EVERY)
def test_through_a_file(model: nn.Module, tmp_path: Path, policy: object) -> None:
    cache = read(model, policy)
    assert_goes_on(model, through_file(cache, model, tmp_path), cache)


@pytest.mark.parametrize("length", [15, PROMPT], ids=["window not full", "window full"])
@pytest.mark.parametrize("name", list(MODELS)[1:])
def test_layers_with_windows_go_through_a_file(tmp_path: Path, name: str, length: int) -> None:
    model = model_of(name)
    cache = read(model, length=length)
    assert cache.windows
    loaded = through_file(cache, model, tmp_path)
    assert loaded.get_seq_length() == length
    assert_goes_on(model, loaded, cache)


@pytest.mark.parametrize("policy", EVERY.values(), ids=EVERY)
def test_keys_and_values_of_two_types_go_through_a_file(model: nn.Module, tmp_path: Path, policy: object) -> None:
    # rotary positions leave keys in float32 where values are bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        cache = read(model, policy)
    state = cache.stores[0].state()
    assert (state["k"].dtype, state["v"].dtype) == (torch.float32, torch.bfloat16)
    loaded = through_file(cache, model, tmp_path)
    with torch.autocast("cpu", torch.bfloat16):
        assert_goes_on(model, loaded, cache)
    with pytest.raises(ValueError, match="in one precision"):
        go_on(model, through_file(cache, model, tmp_path))


def pickled(cache: object) -> object:
    return pickle.loads(pickle.dumps(cache))


def torch_saved(cache: object) -> object:
    buffer = io.BytesIO()
    torch.save(cache, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES = {"pickle": pickled, "torch.save": torch_saved, "deepcopy": copy.deepcopy}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("policy", EVERY.values(), ids=EVERY)
def test_copies_of_every_kind(model: nn.Module, policy: object, copied: Callable[[object], object]) -> None:
    cache = read(model, policy)
    assert_goes_on(model, copied(cache), cache)


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("name", MODELS)
def test_copies_of_caches_of_every_model(name: str, copied: Callable[[object], object]) -> None:
    model = model_of(name)
    # a policy that watches keeps what it was told of scores
    cache = read(model, policies.HeavyHitters(), audit=2)
    go_on(model, cache)
    other = copied(cache)
    assert str(other.report()) == str(cache.report())
    assert_goes_on(model, other, cache)
    assert str(other.report()) == str(cache.report())
    assert cache.report().num_audited > 0


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_copies_of_what_was_made_in_inference_mode(model: nn.Module, copied: Callable[[object], object]) -> None:
    with torch.inference_mode():
        cache = read(model)
    assert_goes_on(model, copied(cache), cache)


@pytest.mark.parametrize("length", [30, PROMPT], ids=["whole", "compressed"])
def test_a_pickled_cache_is_not_read_by_attention_that_knows_no_weights(model: nn.Module, length: int) -> None:
    cache = pickled(read(model, length=length))
    with torch.no_grad(), pytest.raises(ValueError, match="did not reach attention.*use\\(model, method\\)"):
        model(tokens(2, 1), past_key_values=cache)


def test_an_empty_cache_goes_on_as_well(model: nn.Module, tmp_path: Path) -> None:
    cache = read(model, length=30)
    cache.crop(-30)
    assert cache.get_seq_length() == 0
    assert_goes_on(model, through_file(cache, model, tmp_path), cache)


@pytest.mark.parametrize("policy", EVERY.values(), ids=EVERY)
def test_a_move_changes_nothing(model: nn.Module, policy: object) -> None:
    # there is one device here: what a move does is to hand the state to a store of the same kind
    cache = read(model, policy)
    other = copy.deepcopy(cache)
    for store in other.stores.values():
        store.move(torch.device("cpu"))
        assert store.device == torch.device("cpu")
    assert_goes_on(model, other, cache)


def test_an_audited_cache_moves_with_its_witness(model: nn.Module) -> None:
    cache = read(model, audit=2)
    other = copy.deepcopy(cache)
    for store in other.stores.values():
        store.move(torch.device("cpu"))
    assert_goes_on(model, other, cache)
    assert str(other.report()) == str(cache.report())


def cut(state: dict[str, Tensor]) -> None:
    state["k"], state["v"] = state["k"][:, :, 1:], state["v"][:, :, 1:]


WINDOWS = {
    "shorter than the window": (cut, "18 tokens of 60 are held by a window of 20"),
    "no values": (lambda state: state.pop("v"), r"lacks \['v'\]"),
    "values of other rows": (lambda state: state.update(v=state["v"][:1]), "do not fit together"),
    "fewer tokens": (lambda state: state.update(numbers=torch.tensor([3])), "19 tokens of 3 are held"),
}


@pytest.mark.parametrize("case", WINDOWS)
def test_a_window_that_cannot_be_is_refused_and_the_cache_stays_as_it_was(case: str) -> None:
    change, message = WINDOWS[case]
    model = model_of("gemma2, windows and caps")
    cache, other = read(model), read(model, length=50)
    number, state = max(cache.windows), cache.state()
    change(state[number])
    expected = copy.deepcopy(other)
    with pytest.raises(ValueError, match=message):
        other.restore(state)
    assert other.get_seq_length() == 50
    assert_goes_on(model, other, expected)


def test_layers_that_read_other_numbers_of_tokens_are_refused(tmp_path: Path) -> None:
    model = model_of("gemma2, windows and caps")
    cache = read(model)
    next(iter(cache.windows.values())).cumulative_length += 1
    with pytest.raises(ValueError, match="different numbers of rows and tokens"):
        through_file(cache, model, tmp_path)
