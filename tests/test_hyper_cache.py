"""A compressed cache in `generate`: the tokens of `DynamicCache` up to its budget, and every mode beyond it."""

from importlib import import_module

import pytest
import torch
from torch import Tensor, nn

import hyperattention as ha
from assertions import assert_exact
from hyperattention import policies
from hyperattention.policies.latest import Latest
from hyperattention.policies.uniform_sample import UniformSample
from tiny_models import VOCABULARY, build, tokens

transformers = pytest.importorskip("transformers")
# ours must import: a failure there is a failure, not a skip
integration = import_module("hyperattention.integrations.transformers")
HyperCache, use = integration.HyperCache, integration.use

PROMPT, NEW, PADDING = 60, 24, 17
SMALL = {"budget": 32, "sinks": 2, "window": 16}
ASSISTED = ("prompt lookup", "assistant")
# transformers' own, which fail in versions up to 5.16 once a text is longer than they are, with `DynamicCache` too
WINDOWS_CROP = hasattr(transformers.cache_utils.CacheLayerMixin, "is_croppable")
LIVE = (torch.arange(PROMPT) >= torch.tensor([[0], [PADDING]])).long()
FAMILIES = {
    "llama": ("Llama", {}, "sdpa"),
    "one kv head each": ("Llama", {"num_key_value_heads": 4}, "sdpa"),
    "one kv head": ("Llama", {"num_key_value_heads": 1}, "sdpa"),
    "mistral": ("Mistral", {"sliding_window": None}, "sdpa"),
    "qwen2 windowed": ("Qwen2", {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1}, "sdpa"),
    "gemma2 windowed": ("Gemma2", {"sliding_window": 20, "attn_logit_softcapping": None}, "eager"),
}
MODES = {
    "greedy": {},
    "sampling": {"do_sample": True},
    "several sequences": {"do_sample": True, "num_return_sequences": 2},
    "beams": {"num_beams": 3},
    "chunked prefill": {"prefill_chunk_size": 13},
    # versions before 5.16 compare guesses with the end token even where there is none: here is one that no text has
    "prompt lookup": {"prompt_lookup_num_tokens": 3, "eos_token_id": VOCABULARY},
    "assistant": {"assistant_model": None},
}


def family(name: str) -> nn.Module:
    kind, options, implementation = FAMILIES[name]
    model = build(kind, options)
    model.set_attn_implementation(implementation)
    return model


@pytest.fixture
def model() -> nn.Module:
    return family("llama")


def assistant_of(model: nn.Module) -> nn.Module:
    # nearly the same model, so that some guesses are right and some are not
    assistant = type(model)(model.config).eval()
    assistant.load_state_dict(model.state_dict())
    torch.manual_seed(2)
    with torch.no_grad():
        for weight in assistant.parameters():
            weight.add_(0.03 * torch.randn_like(weight))
    return assistant


def generate(model: nn.Module, mode: str = "greedy", new: int = NEW, **options: object) -> Tensor:
    given = {"do_sample": False} | MODES[mode]
    if "assistant_model" in given:
        given["assistant_model"] = assistant_of(model)
    # assisted decoding takes one sequence
    rows = 1 if mode in ASSISTED else 2
    torch.manual_seed(1)
    return model.generate(tokens(2, PROMPT)[:rows], attention_mask=LIVE[:rows], max_new_tokens=new, **given, **options)


def skip_what_windows_cannot(name: str, mode: str) -> None:
    if "windowed" in name and mode in ASSISTED and not WINDOWS_CROP:
        pytest.skip(f"sliding windows of transformers {transformers.__version__} cannot take guesses back")


def with_cache(model: nn.Module, cache: object, mode: str = "greedy", **options: object) -> Tensor:
    with use(model, ha.Exact()):
        return generate(model, mode, past_key_values=cache, **options)


def cache_of(model: nn.Module, policy: object = None, **room: int) -> object:
    return HyperCache(model.config, policy=policy, **(SMALL | room))


@pytest.mark.filterwarnings("ignore:no attention call was approximated")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", FAMILIES)
def test_up_to_the_budget_tokens_are_those_of_a_dynamic_cache(name: str, mode: str) -> None:
    skip_what_windows_cannot(name, mode)
    model = family(name)
    reference = generate(model, mode)
    # guesses of assisted decoding, which are taken back, come on top
    cache = cache_of(model, budget=PROMPT + NEW + 24)
    assert torch.equal(with_cache(model, cache, mode), reference)
    assert all(store.is_whole for store in cache.stores.values())


@pytest.mark.parametrize("policy", [Latest(), UniformSample()], ids=["latest", "uniform"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["llama", "qwen2 windowed", "gemma2 windowed"])
def test_beyond_the_budget_every_mode_runs_within_it(name: str, mode: str, policy: object) -> None:
    skip_what_windows_cannot(name, mode)
    model = family(name)
    reference, cache = generate(model, mode), cache_of(model, policy)
    out = with_cache(model, cache, mode)
    assert out.shape == reference.shape
    # what was dropped is missed, but by a model that repeats itself whatever it reads
    assert name == "gemma2 windowed" or not torch.equal(out, reference)
    assert cache.get_seq_length() == out.shape[1] - 1
    for store in cache.stores.values():
        assert not store.is_whole
        assert store.num_slots <= SMALL["budget"]
        bound = store.batch * model.config.num_key_value_heads * (SMALL["budget"] + 1) * (2 * 16 * 4 + 3 * 4)
        assert store.memory_bytes <= bound


@pytest.mark.filterwarnings("ignore:no attention call was approximated")
@pytest.mark.parametrize("mode", MODES)
def test_one_look_at_the_prompt_drops_a_share_of_it_beyond_the_budget_alone(model: nn.Module, mode: str) -> None:
    # a chunk is a prompt, and guesses are none
    most = 12 if mode == "chunked prefill" else 32
    policy = policies.LookOnce(keep=0.5, latest=8, pages=policies.TopPages(page=4, most_queries=most))
    reference, within, beyond = (
        generate(model, mode),
        cache_of(model, policy, budget=PROMPT + NEW + 24),
        cache_of(model, policy),
    )
    assert torch.equal(with_cache(model, within, mode), reference)
    out = with_cache(model, beyond, mode)
    assert out.shape == reference.shape
    assert not torch.equal(out, reference)
    assert beyond.get_seq_length() == out.shape[1] - 1
    for store, other in zip(beyond.stores.values(), within.stores.values(), strict=True):
        assert other.num_slots == other.seen
        assert store.num_slots < store.seen
        assert store.memory_bytes < other.memory_bytes


def test_layers_with_windows_keep_transformers_own_cache() -> None:
    for name in ("qwen2 windowed", "gemma2 windowed"):
        model = family(name)
        cache, plain = cache_of(model), transformers.DynamicCache(config=model.config)
        windows = [number for number, layer in enumerate(plain.layers) if layer.is_sliding]
        assert windows
        assert windows == [number for number in range(len(cache.layers)) if number not in cache.stores]
        assert all(type(cache.layers[number]) is type(plain.layers[number]) for number in windows)
    with pytest.raises(ValueError, match="no layer of full attention"):
        cache_of(build("Mistral", {"sliding_window": 20}))


@pytest.mark.filterwarnings("ignore:no attention call was approximated")
@pytest.mark.parametrize("room", [{"budget": 200}, {}], ids=["within", "beyond"])
def test_a_second_call_goes_on_where_the_first_ended(model: nn.Module, room: dict[str, int]) -> None:
    cache = cache_of(model, Latest(), **room)
    whole = with_cache(model, cache_of(model, Latest(), **room))
    first = with_cache(model, cache, new=10)
    live = torch.nn.functional.pad(LIVE, (0, 10), value=1)
    with use(model, ha.Exact()):
        second = model.generate(first, attention_mask=live, max_new_tokens=NEW - 10, do_sample=False, past_key_values=cache)
    assert torch.equal(second, whole)


def test_a_padded_row_is_what_it_would_be_alone(model: nn.Module) -> None:
    # `Latest` decides by order alone. `UniformSample` draws by the position in the padded text, so that a row alone draws
    # other keys of the same law: there is nothing to compare bit by bit
    caches = [cache_of(model, Latest()) for _ in range(2)]
    both = with_cache(model, caches[0])
    with use(model, ha.Exact()):
        alone = model.generate(
            tokens(2, PROMPT)[1:, PADDING:], max_new_tokens=NEW, do_sample=False, past_key_values=caches[1]
        )
    assert torch.equal(both[1, PADDING:], alone[0])
    for together, single in zip(caches[0].stores.values(), caches[1].stores.values(), strict=True):
        assert torch.equal(together.held.position[1:] - PADDING, single.held.position)
        assert bool(together.held.live.all())


def test_padding_is_never_held_where_keys_are_left(model: nn.Module) -> None:
    cache = cache_of(model, UniformSample())
    with_cache(model, cache)
    for store in cache.stores.values():
        assert bool(store.held.live.all())
        assert store.held.position[1].min() >= PADDING
        assert store.held.position[0].min() == 0
        # weights stand for all keys there are, padding left out
        total = store.held.log_weight.exp().sum(-1)
        assert_sums(total[0], store.seen)
        assert_sums(total[1], store.seen - PADDING)


def assert_sums(total: Tensor, wanted: int) -> None:
    assert_exact(total, torch.full_like(total, wanted))


def test_positions_and_masks_stay_those_of_the_text(model: nn.Module) -> None:
    cache = cache_of(model)
    with_cache(model, cache)
    seen, held = PROMPT + NEW - 1, cache.stores[0].num_slots
    assert cache.get_seq_length() == seen
    assert cache.get_mask_sizes(5, 0) == (held + 5, seen - held)
    assert cache.layers[0].get_max_length() == cache.layers[0].get_max_cache_shape() == -1


def test_compressed_reads_are_counted_as_approximated(model: nn.Module) -> None:
    with use(model, ha.Exact()) as calls:
        generate(model, past_key_values=cache_of(model))
    layers = model.config.num_hidden_layers
    assert calls.counts.approximated == (NEW - 1) * layers
    assert calls.counts.exact == {"exact method": layers}


def test_a_prompt_is_read_in_full_before_it_is_compressed(model: nn.Module) -> None:
    with torch.no_grad():
        reference = model(tokens(1, PROMPT)).logits
        with pytest.warns(UserWarning, match="exact method"), use(model, ha.Exact()):
            ours = model(tokens(1, PROMPT), past_key_values=cache_of(model)).logits
    assert_exact(ours, reference)


def filled(model: nn.Module, length: int = PROMPT, **room: int) -> object:
    cache = cache_of(model, UniformSample(), **room)
    with torch.no_grad(), pytest.warns(UserWarning, match="exact"), use(model, ha.Exact()):
        model(tokens(1, length), past_key_values=cache)
    return cache


def test_tokens_of_the_window_are_forgotten_and_no_others(model: nn.Module) -> None:
    cache = filled(model)
    cache.crop(-3)
    assert cache.get_seq_length() == PROMPT - 3
    cache.crop(-(SMALL["window"] - 3))
    with pytest.raises(ValueError, match=r"forget the latest 1 tokens.*give a window of at least 1"):
        cache.crop(-1)
    assert cache.get_seq_length() == PROMPT - SMALL["window"]


def test_what_is_forgotten_leaves_no_trace(model: nn.Module) -> None:
    # room for three tokens more before the next compression
    cache, straight = filled(model, budget=48), filled(model, budget=48)
    with torch.no_grad(), use(model, ha.Exact()):
        model(tokens(1, PROMPT + 3)[:, PROMPT:], past_key_values=cache)
        cache.crop(-3)
        ours, wanted = (model(tokens(1)[:, -2:], past_key_values=each).logits for each in (cache, straight))
    assert torch.equal(ours, wanted)


def test_a_cache_that_is_reset_starts_anew(model: nn.Module) -> None:
    cache = cache_of(model)
    first = with_cache(model, cache)
    cache.reset()
    assert (cache.get_seq_length(), cache.memory_bytes) == (0, 0)
    assert torch.equal(with_cache(model, cache), first)


def test_rows_are_repeated_and_selected(model: nn.Module) -> None:
    cache = cache_of(model)
    with_cache(model, cache)
    before = cache.stores[0].held.k.clone()
    cache.batch_repeat_interleave(2)
    assert torch.equal(cache.stores[0].held.k, before.repeat_interleave(2, 0))
    cache.batch_select_indices(torch.tensor([3, 0]))
    assert torch.equal(cache.stores[0].held.k, before.flip(0))


def test_attention_that_cannot_read_weights_is_refused(model: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"'sdpa' cannot read the weights.*use\(model"):
        generate(model, past_key_values=cache_of(model))
    integration.register()
    model.set_attn_implementation(integration.NAME)
    generate(model, past_key_values=cache_of(model))


def test_gradients_are_refused(model: nn.Module) -> None:
    with pytest.raises(ValueError, match="no gradient"), use(model, ha.Exact()):
        model(tokens(1, PROMPT), past_key_values=cache_of(model))


def go_on(model: nn.Module, cache: object, **inputs: object) -> Tensor:
    with torch.no_grad(), use(model, ha.Exact()):
        return model(tokens(1, 5), past_key_values=cache, **inputs).logits


def test_a_dense_mask_over_a_compressed_cache_is_refused(model: nn.Module) -> None:
    cache = filled(model)
    mask = torch.ones(1, 1, 5, cache.stores[0].num_slots + 5, dtype=torch.bool)
    with pytest.raises(ValueError, match="only padding can be"):
        go_on(model, cache, attention_mask=mask)


def test_packed_documents_over_a_compressed_cache_are_refused(model: nn.Module) -> None:
    cache = filled(model)
    reader = transformers.AttentionInterface()[integration.NAME]
    keys, values = cache.layers[0].update(torch.zeros(1, 2, 5, 16), torch.zeros(1, 2, 5, 16))
    documents = torch.ones(1, keys.shape[2], dtype=torch.int32)
    with pytest.raises(ValueError, match="only padding can be"):
        reader(model.model.layers[0].self_attn, torch.zeros(1, 4, 5, 16), keys, values, documents)


def test_dropout_over_a_compressed_cache_is_refused() -> None:
    model = build("Llama", {"attention_dropout": 0.5})
    model.set_attn_implementation("sdpa")
    cache = filled(model)
    with pytest.raises(ValueError, match="model.eval"):
        go_on(model.train(), cache)


def reads_copies(module: nn.Module, query: Tensor, key: Tensor, *others: object, **options: object) -> tuple:
    return transformers.AttentionInterface()[integration.NAME](module, query, key.clone(), *others, **options)


def test_a_model_that_changes_keys_on_their_way_to_attention_is_refused(model: nn.Module) -> None:
    integration.register()
    reads_copies._hyperattention_reads_held = True
    transformers.AttentionInterface.register("reads_copies", reads_copies)
    model.set_attn_implementation("reads_copies")
    with pytest.raises(ValueError, match="weights were lost"):
        generate(model, past_key_values=cache_of(model))


@pytest.mark.parametrize(
    ("room", "message"), [({"budget": 18}, "more than 18"), ({"sinks": -1}, "sinks=-1"), ({"window": 0}, "window=0")]
)
def test_room_that_is_none_is_refused(model: nn.Module, room: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cache_of(model, **room)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"budget": 33}, None),
        ({"budget": 32}, "besides 16 sinks and 16 window keys: give at least 33"),
        ({"budget": 0}, "give at least 33"),
        ({"budget": 21, "policy": policies.TopPages()}, "besides 16 sinks and 5 window keys: give at least 22"),
        ({"budget": 64, "policy": "pages"}, "policy='pages' is not a policy"),
        ({"budget": 64, "policy": policies.TopPages}, "is not a policy: give a policy object of this package"),
        ({"budget": "64"}, "budget='64' is not an integer: give an integer number"),
    ],
)
def test_bad_arguments_are_told(model: nn.Module, given: dict[str, object], message: str | None) -> None:
    if message is None:
        HyperCache(model.config, **given)
        return
    # the checks of annotations that tests switch on would come first
    with pytest.raises((ValueError, TypeError)) as raised:
        HyperCache.__init__.__wrapped__(HyperCache.__new__(HyperCache), model.config, **given)
    assert message in str(raised.value)
