"""Which models a compressed cache serves: capped scores, sinks and shared keys are read; others are refused in time."""

from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import assertions
import hyperattention as ha
from hyperattention import policies
from hyperattention.cache.attended import attended
from hyperattention.cache.audited import AuditedStore
from hyperattention.cache.budget import CacheBudget
from hyperattention.cache.compressing import CompressingStore
from hyperattention.cache.score_rule import ScoreRule
from hyperattention.cache.slots import CacheSlots
from hyperattention.files.fingerprint import fingerprint
from hyperattention.integrations.transformers.cache_handle import Handle, attach, handle_of
from hyperattention.policies.latest import Latest
from hyperattention.random import SEED_LIMIT
from tiny_models import SHAPE, assert_exact, build, tokens

transformers = pytest.importorskip("transformers")
integration = import_module("hyperattention.integrations.transformers")
file = import_module("hyperattention.integrations.transformers.cache_file")

PROMPT, LENGTH = 40, 48
GEMMA3N = {
    "num_hidden_layers": 5, "num_kv_shared_layers": 2, "sliding_window": 20, "vocab_size_per_layer_input": 97,
    "hidden_size_per_layer_input": 8, "laurel_rank": 4, "activation_sparsity_pattern": [0.0] * 5,
    "layer_types": ["sliding_attention", "full_attention", "full_attention", "full_attention", "full_attention"],
}  # fmt: skip
SERVED = {
    "gemma2": ("Gemma2", {"sliding_window": 20, "attn_logit_softcapping": 3.0}),
    "gpt-oss": ("GptOss", {"sliding_window": 20, "num_local_experts": 2, "num_experts_per_tok": 1}),
    "gemma3n": ("Gemma3n", GEMMA3N),
    "mllama": ("Mllama", {"num_hidden_layers": 3, "cross_attention_layers": [1]}),
}
KINDS = {
    "means": policies.ClusterMeans(latest=4),
    "hitters": policies.HeavyHitters(),
    "pages": policies.TopPages(page=4),
    "look once": policies.LookOnce(keep=0.7, latest=4, pages=policies.TopPages(page=4)),
    "subgen": policies.SubGen(delta=3.0, samples=2, value_samples=8, most_clusters=99),
}
pytestmark = pytest.mark.filterwarnings("ignore:no attention call was approximated")


def model_of(name: str) -> nn.Module:
    kind, options = SERVED[name]
    suffix = "TextConfig" if kind in ("Gemma3n", "Mllama") else "Config"
    # sinks and scores that matter
    torch.manual_seed(0)
    configs = transformers.models.mllama.configuration_mllama if kind == "Mllama" else transformers
    config = getattr(configs, kind + suffix)(**(SHAPE | options))
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        for weight_name, weight in model.named_parameters():
            if "sinks" in weight_name:
                weight.uniform_(0.0, 3.0)
    return model


def read_on(model: nn.Module, cache: object) -> Tensor:
    text, logits = tokens(2, LENGTH), []
    with torch.no_grad():
        for begin, end in ((0, PROMPT), *((at, at + 1) for at in range(PROMPT, LENGTH))):
            logits.append(model(text[:, begin:end], past_key_values=cache).logits)
    return torch.cat(logits, 1)


@pytest.mark.parametrize(
    ("name", "kind"),
    [*((name, kind) for name in ("gemma2", "gpt-oss") for kind in KINDS), ("gemma3n", "hitters"), ("mllama", "pages")],
)
def test_within_the_budget_logits_are_those_of_a_dynamic_cache_and_beyond_it_near(name: str, kind: str) -> None:
    model, policy = model_of(name), KINDS[kind]
    expected = read_on(model, transformers.DynamicCache(config=model.config))
    # rows of the text before it is compressed, and after
    caches = [integration.HyperCache(model.config, budget=each, sinks=2, window=12, policy=policy) for each in (200, 34)]
    with integration.use(model, ha.Exact()):
        within, beyond = (read_on(model, cache) for cache in caches)
    assert_exact(within, expected)
    assert_exact(beyond[:, :PROMPT], expected[:, :PROMPT])
    assert bool(beyond.isfinite().all())
    assert not torch.equal(beyond, within)
    assert not any(store.is_whole for store in caches[1].stores.values())
    # far from what is said of no text at all
    off = (beyond - expected).norm() / expected.norm()
    assert off < 0.5


def qkv(slots: int = 30, new: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(2, heads, num, 8, generator=generator) for heads, num in ((4, new), (2, slots), (2, slots)))


RULES = {
    "cap": ScoreRule(1.5),
    "sinks": ScoreRule(None, torch.tensor([0.0, 2.0, -1.0, 4.0])),
    "both": ScoreRule(1.5, torch.tensor([0.0, 2.0, -1.0, 4.0])),
}


def written_out(q: Tensor, k: Tensor, v: Tensor, rule: ScoreRule, weight: Tensor | None = None) -> Tensor:
    """Attention with all that a rule says, in float64: the last queries face the last keys."""
    q, k, v = q.double(), k.double().repeat_interleave(2, 1), v.double().repeat_interleave(2, 1)
    scores = q @ k.transpose(2, 3) * 8**-0.5
    scores = scores if rule.softcap is None else rule.softcap * torch.tanh(scores / rule.softcap)
    scores = scores if weight is None else scores + weight.double().repeat_interleave(2, 1)[:, :, None]
    later = torch.ones(q.shape[2], k.shape[2]).triu(k.shape[2] - q.shape[2] + 1).bool()
    scores = scores.masked_fill(later, -torch.inf)
    if rule.sinks is not None:
        scores = torch.cat([scores, rule.sinks.double()[None, :, None, None].expand(*scores.shape[:3], 1)], -1)
    return scores.softmax(-1)[..., : k.shape[2]] @ v


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_a_coreset_is_read_with_weights_beside_the_rule(rule: ScoreRule) -> None:
    q, k, v = qkv()
    weight = torch.rand(2, 2, 30, generator=torch.Generator().manual_seed(1)) * 2
    part = ha.Coreset(k, v, weight).attend(q, own=3, softcap=rule.softcap)
    assertions.assert_exact(rule.drop_sinks(part).out, written_out(q, k, v, rule, weight))


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_pages_that_are_all_chosen_are_read_exactly(rule: ScoreRule) -> None:
    q, k, v = qkv()
    # a budget of 29 reads all but nothing: sinks, 6 pages and the window are all 30 keys, the last page but partly
    store = policies.TopPages(page=2).store(CacheBudget(29, 2, 4), 0, 0, None)
    store.append(k[:, :, :27], v[:, :, :27])
    store.end_step(q, 8**-0.5)
    store.append(k[:, :, 27:], v[:, :, 27:])
    assert not store.is_whole
    out = store.attend(q, 8**-0.5, rule).out
    listed = store.chosen
    assert int((listed >= 0).sum(-1).min()) * 2 + 2 + 4 + 3 >= 28
    assertions.assert_exact(out, written_out(q, k, v, rule))


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_what_is_watched_is_what_was_attended_to(rule: ScoreRule) -> None:
    q, k, v = qkv()
    zero = torch.zeros(2, 2, 30)
    ours = attended(CacheSlots(k, v, zero, zero.int(), zero), q, 8**-0.5, rule)
    # attention to one-hot values is the weights
    weights = written_out(q, k, torch.eye(30).expand(2, 2, -1, -1), rule)
    assertions.assert_exact(ours, weights.sum(2).unflatten(1, (2, 2)).sum(2))


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_an_audit_judges_by_the_same_rule(rule: ScoreRule) -> None:
    q, k, v = qkv(60, 60)
    store = AuditedStore(CompressingStore(Latest(), CacheBudget(24, 2, 8)), 1, 0)
    outs = []
    for at in (slice(0, 40), *(slice(i, i + 4) for i in range(40, 60, 4))):
        store.append(k[:, :, at], v[:, :, at])
        outs.append(store.attend(q[:, :, at], 8**-0.5, rule).out)
        store.end_step(q[:, :, at], 8**-0.5, rule)
    out, exact = torch.cat(outs, 2)[:, :, 40:].double(), written_out(q, k, v, rule)[:, :, 40:]
    error = ((out - exact).norm(dim=-1) / exact.norm(dim=-1)).mean(0)
    assert error.max() > 0.01
    # relative errors: what is rounded are outputs over outputs
    assertions.assert_exact(store.errors, error, size=1.0)


def test_a_cap_has_no_gradient() -> None:
    q, k, v = qkv()
    with pytest.raises(ValueError, match=r"softcap=1.5 has no gradient"):
        ha.Coreset.of(k.requires_grad_(), v).attend(q, softcap=1.5)


LATENT = {"kv_lora_rank": 16, "q_lora_rank": None, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12}
MOE = {"n_routed_experts": 2, "num_experts_per_tok": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 2}
REFUSED = {
    "deepseek v2": ("DeepseekV2", LATENT | {"first_k_dense_replace": 2}, "caches latents"),
    "deepseek v3": ("DeepseekV3", LATENT | MOE, "caches latents"),
    "diffllama": ("DiffLlama", {}, "half of the values"),
    "jetmoe": ("JetMoe", {"num_local_experts": 2, "num_experts_per_tok": 1}, "repeats keys"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_model_that_cannot_be_served_is_refused_when_its_cache_is_made(case: str) -> None:
    kind, options, message = REFUSED[case]
    config = getattr(transformers, f"{kind}Config")(**(SHAPE | {"num_key_value_heads": 4} | options))
    modeling = import_module(type(config).__module__.replace("configuration_", "modeling_"))
    if "caches latents" in message and not any(
        "expand_kv" in vars(x) for x in vars(modeling).values() if isinstance(x, type)
    ):
        pytest.skip(f"transformers {transformers.__version__} caches keys and values of this model as attention reads them")
    with pytest.raises(ValueError, match=f"does not support {config.model_type}, which .*{message}.*DynamicCache"):
        integration.HyperCache(config, budget=64)


def lose_keys(*args: object, **options: object) -> tuple:
    module, query, key, *rest = args
    return transformers.AttentionInterface()[integration.NAME](module, query, key.clone(), *rest, **options)


def test_keys_that_are_lost_are_missed_in_the_second_layer_of_the_first_step() -> None:
    integration.register()
    lose_keys._hyperattention_reads_held = True
    transformers.AttentionInterface.register("lose_keys", lose_keys)
    model = build("Llama", {})
    model.set_attn_implementation("lose_keys")
    cache = integration.HyperCache(model.config, budget=40, sinks=2, window=16)
    with torch.no_grad(), pytest.raises(ValueError, match="weights were lost"):
        model(tokens(1, PROMPT), past_key_values=cache)
    assert not cache.stores[1].seen


def test_values_that_are_changed_are_missed_at_once() -> None:
    store = CompressingStore(Latest(), CacheBudget(24, 2, 8))
    _, k, v = qkv()
    handle = Handle(store, 30, 0, None)
    keys, values = attach(*store.append(k, v), handle)
    assert handle_of(keys) is handle
    with pytest.raises(ValueError, match=r"changed the values .*\(2, 1, 30, 8\)"):
        handle.check(values[:, :1], None, True, {}, 0.0)
    handle.check(values, None, True, {}, 0.0)


def test_what_a_model_adds_in_every_step_is_refused_in_the_first() -> None:
    store = CompressingStore(Latest(), CacheBudget(64, 2, 8))
    _, k, v = qkv()
    handle = Handle(store, 30, 0, None)
    _, values = attach(*store.append(k, v), handle)
    assert store.is_whole
    with pytest.raises(ValueError, match=r"does not support the arguments \['position_bias'\]"):
        handle.check(values, None, True, {"position_bias": torch.zeros(1), "softcap": 3.0}, 0.0)


@pytest.mark.parametrize("given", ["position_ids", "cu_seq_lens_q"])
def test_packed_documents_over_a_compressed_cache_are_refused(given: str) -> None:
    model = build("Llama", {})
    cache = integration.HyperCache(model.config, budget=34, sinks=2, window=12)
    restarts = torch.arange(8).remainder(4)[None]
    packed = {
        "position_ids": {"position_ids": restarts},
        "cu_seq_lens_q": {"cu_seq_lens_q": torch.tensor([0, 4, 8]), "cu_seq_lens_k": torch.tensor([0, 4, 8])},
    }[given]
    with torch.no_grad(), integration.use(model, ha.Exact()):
        model(tokens(1, PROMPT), past_key_values=cache)
        with pytest.raises(ValueError, match=f"{given} .*over a compressed cache.*its own row, or its own cache"):
            model(tokens(1, 8), past_key_values=cache, **packed)


def test_keys_handed_out_by_a_compressed_store_say_nothing_without_their_handle() -> None:
    store = CompressingStore(Latest(), CacheBudget(24, 2, 8))
    q, k, v = qkv()
    store.append(k, v)
    store.end_step(q, 1.0)
    keys, values = attach(*store.append(k[:, :, :1], v[:, :, :1]), Handle(store, 1, 30, None))
    assert keys.shape == values.shape == (2, 2, store.num_slots, 8)
    assert bool(keys.isnan().all())
    assert bool(values.isnan().all())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"seed": -1}, "seed=-1"),
        ({"seed": SEED_LIMIT}, "seed="),
        ({"sinks": 2.0}, "sinks=2.0"),
        ({"window": 8.0}, "window=8.0"),
    ],
)
def test_what_a_file_could_not_hold_is_refused_when_a_cache_is_made(given: dict[str, object], message: str) -> None:
    config = build("Llama", {}).config
    # the checks of annotations that tests switch on would come first
    with pytest.raises((ValueError, TypeError)) as raised:
        integration.HyperCache.__init__.__wrapped__(
            integration.HyperCache.__new__(integration.HyperCache), config, **({"budget": 64} | given)
        )
    assert message in str(raised.value)


def test_a_cache_is_loaded_for_a_model_whose_parameters_are_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # as accelerate leaves a model that it offloads: parameters on no device, until its hooks put them where they compute
    model = build("Llama", {})
    cache = integration.HyperCache(model.config, budget=40, sinks=2, window=16)
    with torch.no_grad(), integration.use(model, ha.Exact()):
        model(tokens(2, PROMPT), past_key_values=cache)
    away = build("Llama", {}).to("meta")
    assert away.device.type == "meta"
    # accelerate would fetch its weights
    own = fingerprint(model)
    monkeypatch.setattr(file, "fingerprint", lambda _: own)
    file.save_cache(cache, away, tmp_path / "doc.safetensors", tokens=tokens(2, PROMPT))
    loaded, text = file.load_cache(tmp_path / "doc.safetensors", away)
    assert torch.equal(text, tokens(2, PROMPT))
    # the loaded cache asks the configuration of its own model
    with torch.no_grad(), integration.use(model, ha.Exact()), integration.use(away, ha.Exact()):
        ours, expected = (model(tokens(2, 1), past_key_values=each).logits for each in (loaded, cache))
    assert torch.equal(ours, expected)
