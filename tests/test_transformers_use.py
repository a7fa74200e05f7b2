"""What `use` promises beside the numbers: it counts, restores, isolates, refuses, and builds no dense mask."""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module

import pytest
import torch
from torch import Tensor, nn

import hyperattention as ha
from tiny_models import FULL, LENGTH, NUM_LAYERS, SMALL, assert_exact, build, left_padding, packed_positions, tokens

transformers = pytest.importorskip("transformers")
# ours must import: a failure there is a failure, not a skip
integration = import_module("hyperattention.integrations.transformers")
masks = import_module("hyperattention.integrations.transformers.masks")
exact = import_module("hyperattention.integrations.transformers.exact")
forward = import_module("hyperattention.integrations.transformers.forward")
tiny_families = import_module("tiny_families")
use = integration.use


@pytest.fixture
def model() -> nn.Module:
    model = build("Llama", {})
    model.set_attn_implementation("sdpa")
    return model


def logits(model: nn.Module, **inputs: object) -> Tensor:
    with torch.no_grad():
        return model(tokens(1), **inputs).logits


PACKED = {"position_ids": packed_positions(), "use_cache": False}


def test_counts_by_reason(model: nn.Module) -> None:
    causal = torch.ones(LENGTH, LENGTH).tril().bool()[None, None]
    reference = logits(model)
    with use(model, SMALL, layers=[1], min_length=100) as calls:
        logits(model)
        logits(model, attention_mask=causal)
        model(tokens(1)[:, :50])
        model(tokens(1)[:, :1])
        before = calls.counts
    assert before.approximated == 1
    assert before.exact == {"layer not listed": 3, "dense mask": 1, "below min_length": 1, "single query": 2}
    assert before.share_approximated == pytest.approx(1 / 8)
    assert str(before).startswith("1 of 8 attention calls approximated (12%); exact: layer not listed (3 calls), ")
    assert torch.equal(logits(model), reference)


@pytest.mark.parametrize("method", [SMALL, ha.Exact()], ids=["small", "exact"])
def test_an_unknown_argument_of_attention_is_refused_by_name(model: nn.Module, method: object) -> None:
    reference = logits(model)
    with pytest.raises(ValueError, match=r"LlamaAttention .* 'indices'.* not known"), use(model, method):
        logits(model, indices=torch.zeros(1, dtype=torch.long))
    assert torch.equal(logits(model), reference)


@pytest.mark.parametrize("inputs", [{}, PACKED, {"attention_mask": left_padding()[1:]}], ids=["plain", "packed", "padded"])
def test_exact_method_is_counted_as_exact_and_equal(model: nn.Module, inputs: dict) -> None:
    reference = logits(model, **inputs)
    live = inputs.get("attention_mask", torch.ones(1, LENGTH)).bool()
    with pytest.warns(UserWarning, match="exact method"), use(model, ha.Exact()) as calls:
        ours = logits(model, **inputs)
    assert_exact(ours[live], reference[live])
    assert calls.counts.exact == {"exact method": NUM_LAYERS}


def test_dropout_in_training_is_exact_and_counted() -> None:
    model = build("Llama", {"attention_dropout": 0.5}).train()
    drawn = []
    for implementation in ("sdpa", "hyperattention"):
        integration.register()
        model.set_attn_implementation(implementation)
        torch.manual_seed(3)
        drawn.append(logits(model))
    assert torch.equal(*drawn)
    with pytest.warns(UserWarning, match="dropout"), use(model, SMALL) as calls:
        logits(model)
    assert calls.counts.exact == {"dropout": NUM_LAYERS}


def test_restores_after_nesting_and_errors(model: nn.Module) -> None:
    reference = logits(model)
    keys = [set(vars(module)) for module in model.modules()]
    config = json.loads(model.config.to_json_string())
    with use(model, SMALL) as outer:
        small = logits(model)
        with use(model, FULL) as inner:
            assert_exact(logits(model), reference)
            json.loads(model.config.to_json_string())
        assert torch.equal(logits(model), small)
        with pytest.raises(RuntimeError, match="planned"), use(model, FULL):
            raise RuntimeError("planned")
        assert torch.equal(logits(model), small)
    assert (outer.counts.approximated, inner.counts.approximated) == (3 * NUM_LAYERS, NUM_LAYERS)
    assert model.config._attn_implementation == "sdpa"
    assert [set(vars(module)) for module in model.modules()] == keys
    assert json.loads(model.config.to_json_string()) == config
    assert torch.equal(logits(model), reference)


def test_blocks_left_in_the_order_of_entry_are_refused_and_undone(model: nn.Module) -> None:
    reference, keys = logits(model), [set(vars(module)) for module in model.modules()]
    first, second = use(model, SMALL), use(model, FULL)
    first.__enter__()
    inner = second.__enter__()
    with pytest.raises(RuntimeError, match="LlamaForCausalLM was closed while a block that was opened later is still open"):
        first.__exit__(None, None, None)
    assert_exact(logits(model), reference)
    assert inner.counts.approximated == NUM_LAYERS
    second.__exit__(None, None, None)
    assert model.config._attn_implementation == "sdpa"
    assert [set(vars(module)) for module in model.modules()] == keys
    assert torch.equal(logits(model), reference)


@pytest.mark.parametrize("inner_first", [True, False])
def test_blocks_on_a_model_and_on_a_part_of_it_are_undone(model: nn.Module, inner_first: bool) -> None:
    blocks = [use(model, SMALL, warn=False), use(model.model, FULL, warn=False)]
    first, second = reversed(blocks) if inner_first else blocks
    first.__enter__()
    second.__enter__()
    with pytest.raises(RuntimeError, match="opened later"):
        first.__exit__(None, None, None)
    assert model.config._attn_implementation == integration.NAME
    second.__exit__(None, None, None)
    assert model.config._attn_implementation == "sdpa"
    assert not any("_hyperattention" in vars(module) for module in model.modules())


def test_a_block_of_another_thread_is_refused_while_one_is_open(model: nn.Module) -> None:
    reference = logits(model)

    def other() -> str:
        try:
            with use(model, FULL, warn=False):
                return "opened"
        except ValueError as refusal:
            return str(refusal)

    with ThreadPoolExecutor(1) as thread:
        with use(model, SMALL) as calls:
            assert "another thread" in thread.submit(other).result()
            assert (logits(model) - reference).abs().max() > 1e-2
        assert calls.counts.approximated == NUM_LAYERS
        assert thread.submit(other).result() == "opened"
    assert torch.equal(logits(model), reference)


def test_the_warning_can_be_left_out(model: nn.Module, recwarn: pytest.WarningsRecorder) -> None:
    with use(model, ha.Exact(), warn=False):
        logits(model)
    assert not recwarn.list
    with use(model, ha.Exact()):
        logits(model)
    assert len(recwarn.list) == 1


KEPT = (torch.arange(LENGTH) >= 40)[None, None, None]
DENSE = KEPT & torch.ones(LENGTH, LENGTH).tril().bool() | torch.eye(LENGTH).bool()
ADDED = torch.zeros(1, 1, LENGTH, LENGTH).masked_fill(~DENSE, torch.finfo(torch.float32).min)
FORMS = {
    "bool [1, 1, queries, keys]": DENSE,
    "bool [1, 1, 1, keys]": KEPT,
    "bool [1, heads, queries, keys]": DENSE.expand(1, 4, -1, -1),
    "added [1, 1, queries, keys]": ADDED,
    "added bias": ADDED + torch.linspace(-2, 0, LENGTH),
    "added [1, 1, 1, keys]": torch.linspace(-2, 0, LENGTH)[None, None, None],
}


@pytest.mark.parametrize("method", [SMALL, ha.Exact()], ids=["small", "exact"])
@pytest.mark.parametrize("mask", FORMS.values(), ids=FORMS)
def test_dense_masks_mean_what_they_mean_to_sdpa(model: nn.Module, mask: Tensor, method: object) -> None:
    reference = logits(model, attention_mask=mask)
    if mask is KEPT and method is SMALL:
        method = FULL
    with use(model, method, warn=False):
        assert_exact(logits(model, attention_mask=mask), reference)


@pytest.mark.parametrize("mask", [DENSE.long(), torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.int32)], ids=["int64", "int32"])
def test_a_mask_of_whole_numbers_is_refused(model: nn.Module, mask: Tensor) -> None:
    with pytest.raises(ValueError, match=r"\(1, 1, 320, 320\) and dtype torch.int.*convert"), use(model, SMALL):
        logits(model, attention_mask=mask)


def test_a_mask_that_the_model_did_not_build_is_not_read_as_documents(model: nn.Module) -> None:
    attention = model.model.layers[0].self_attn
    q = k = torch.randn(1, 4, 8, 16)
    with pytest.raises(ValueError, match=r"shape \(1, 8\) and dtype torch.int64"):
        forward.attention_forward(attention, q, k, k, torch.ones(1, 8, dtype=torch.int64))


@torch.no_grad()
@pytest.mark.parametrize("form", ["2-D", "4-D bool", "4-D added"])
def test_decoders_of_the_bert_family_with_left_padding(form: str) -> None:
    decoder = tiny_families.tiny_model("bert")
    decoder.set_attn_implementation("sdpa")
    keep = torch.arange(40) >= torch.tensor([[0], [13]])
    dense = keep[:, None, None] & torch.ones(40, 40).tril().bool() | torch.eye(40).bool()
    added = torch.zeros(2, 1, 40, 40).masked_fill(~dense, torch.finfo(torch.float32).min)
    mask = {"2-D": keep.long(), "4-D bool": dense, "4-D added": added}[form]
    reference = decoder(tokens(2)[:, :40], attention_mask=mask).logits[keep]
    for method in (FULL, ha.Exact()):
        with use(decoder, method, warn=False):
            assert_exact(decoder(tokens(2)[:, :40], attention_mask=mask).logits[keep], reference)


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("glm_moe_dsa", "GlmMoeDsaAttention selects keys in the mask only where"),
        ("deepseek_v32", "DeepseekV32Attention selects keys"),
        ("deepseek_v4", "DeepseekV4Attention changes its mask"),
        ("bloom", "BloomAttention computes attention itself"),
    ],
)
def test_models_that_do_more_around_attention_are_refused_at_once(family: str, message: str) -> None:
    refused = tiny_families.tiny_model(family)
    name = refused.config._attn_implementation
    with pytest.raises(ValueError, match=message), use(refused, ha.Exact()):
        pytest.fail("the block was entered")
    assert refused.config._attn_implementation == name


def test_models_do_not_share_settings(model: nn.Module) -> None:
    other = build("Llama", {})
    with use(model, SMALL) as calls, use(other, FULL) as other_calls:
        first, second = logits(model), logits(other)
    assert (first - second).abs().max() > 1e-2
    assert calls.counts.approximated == other_calls.counts.approximated == NUM_LAYERS


def test_nested_configs_are_restored_one_by_one() -> None:
    text = build("Llama", {}).config.to_dict()
    config = transformers.LlavaConfig(
        text_config=text,
        vision_config={
            "model_type": "clip_vision_model",
            "hidden_size": 32,
            "num_attention_heads": 2,
            "num_hidden_layers": 1,
            "intermediate_size": 32,
            "image_size": 8,
            "patch_size": 4,
        },
    )
    model = transformers.LlavaForConditionalGeneration(config)
    before = {"": "sdpa", "text_config": "eager", "vision_config": "sdpa"}
    model.set_attn_implementation(before)
    with use(model, SMALL):
        assert model.config.text_config._attn_implementation == integration.NAME
    nested = (model.config, model.config.text_config, model.config.vision_config)
    assert [config._attn_implementation for config in nested] == list(before.values())


def test_seed_changes_draws_and_the_same_seed_does_not(model: nn.Module) -> None:
    outs = []
    for seed in (0, 0, 1):
        with use(model, SMALL, seed=seed):
            outs.append(logits(model))
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])


def test_checkpointing_recomputes_the_same_attention() -> None:
    gradients = []
    for checkpointing in (False, True):
        model = build("Llama", {}).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        with use(model, SMALL) as calls:
            model(tokens(1), labels=tokens(1), use_cache=False).loss.backward()
        assert calls.counts.approximated == NUM_LAYERS * (1 + checkpointing)
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


def test_packed_documents_do_not_leak(model: nn.Module) -> None:
    changed = tokens(1).clone()
    changed[:, :100] = 5
    for inputs in (PACKED, {"position_ids": packed_positions()}):
        with use(model, SMALL) as calls, torch.no_grad():
            difference = model(tokens(1), **inputs).logits - model(changed, **inputs).logits
        assert calls.counts.approximated == 2 * NUM_LAYERS
        assert difference[:, :100].abs().max() > 0
        assert torch.equal(difference[:, 100:], torch.zeros_like(difference[:, 100:]))


def test_cumulative_lengths_are_honoured(model: nn.Module) -> None:
    lengths = torch.tensor([0, 100, 137, LENGTH], dtype=torch.int32)
    given = {"cu_seq_lens_q": lengths, "cu_seq_lens_k": lengths, "max_length_q": 183, "max_length_k": 183}
    with use(model, SMALL):
        assert torch.equal(logits(model, **PACKED, **given), logits(model, **PACKED))


SPARSE = {
    "plain": {},
    "padded": {"attention_mask": (torch.arange(LENGTH) > 30).long()[None]},
    "packed": PACKED,
    "packed with a cache": {"position_ids": packed_positions()},
}


def refuse(*_: object, **__: object) -> Tensor:
    raise AssertionError("a dense mask was built")


@pytest.mark.parametrize("inputs", SPARSE.values(), ids=SPARSE)
def test_no_dense_mask_is_built(model: nn.Module, inputs: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masks, "sdpa_mask", refuse)
    monkeypatch.setattr(exact, "visible_rows", refuse)
    with use(model, SMALL) as calls:
        logits(model, **inputs)
    assert calls.counts.share_approximated == 1


def test_a_dense_mask_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    windowed = build("Mistral", {"sliding_window": 48})
    monkeypatch.setattr(masks, "sdpa_mask", refuse)
    with pytest.raises(AssertionError, match="dense mask"), use(windowed, SMALL):
        logits(windowed)


def test_selected_by_name_runs_the_default_method(model: nn.Module) -> None:
    reference = logits(model)
    for _ in range(2):
        integration.register()
    model.set_attn_implementation(integration.NAME)
    # below the crossover, where the default is exact
    assert_exact(logits(model), reference)


def test_unknown_mask_functions_are_not_guessed() -> None:
    from transformers import masking_utils as hf

    def user(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return key >= 0

    assert masks.read_pattern(hf.causal_mask_function) == masks.Pattern(causal=True)
    assert masks.read_pattern(hf.sliding_window_causal_mask_function(9)) == masks.Pattern(causal=True, window=9)
    for unknown in (user, hf.and_masks(hf.causal_mask_function, user), hf.or_masks(hf.causal_mask_function, user)):
        assert masks.read_pattern(unknown) is None
    assert masks.read_pattern(hf.chunked_causal_mask_function(8, torch.zeros(1))) is None


def mamba() -> nn.Module:
    return transformers.MambaModel(transformers.MambaConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1))


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (mamba, {}, "AttentionInterface"),
        (lambda: nn.Linear(2, 2), {}, "holds no transformers model"),
        (lambda: build("Llama", {}), {"layers": [0, 7]}, r"layers \[7\] are not layers .* indices from \[0, 1\]"),
        (lambda: build("Llama", {}), {"min_length": -1}, "min_length is -1"),
        (lambda: build("Llama", {}), {"seed": 2**63}, "seed is 9223372036854775808"),
    ],
)
def test_refusals_say_why(make: Callable[[], nn.Module], options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message), use(make(), SMALL, **options):
        pass


IMPORTED = "import sys, {}; print('transformers' in sys.modules)"


@pytest.mark.slow
def test_importing_the_package_loads_no_transformers(run_python: Callable[[str], str]) -> None:
    assert run_python(IMPORTED.format("hyperattention")).strip() == "False"


@pytest.mark.slow
def test_the_import_check_can_fail(run_python: Callable[[str], str]) -> None:
    assert run_python(IMPORTED.format("hyperattention.integrations.transformers")).strip() == "True"


@pytest.mark.slow
def test_importing_the_integration_registers_nothing(run_python: Callable[[str], str]) -> None:
    code = (
        "import hyperattention.integrations.transformers as t\n"
        "from transformers import AttentionInterface as a\n"
        "print(t.NAME in a._global_mapping); t.register(); print(t.NAME in a._global_mapping)"
    )
    assert run_python(code).split() == ["False", "True"]
