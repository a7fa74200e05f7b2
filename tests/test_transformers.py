"""Tiny random models of each family, run through `use`, against transformers' own exact attention."""

from collections.abc import Callable
from importlib import import_module

import pytest
import torch
from torch import Tensor, nn

from tiny_models import FULL, LENGTH, SMALL, assert_exact, build, left_padding, packed_positions, tokens

transformers = pytest.importorskip("transformers")
use = import_module("hyperattention.integrations.transformers").use

FAMILIES = {
    "llama": ("Llama", {}),
    "mistral": ("Mistral", {"sliding_window": 4096}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {}),
    "gemma": ("Gemma", {}),
    "gemma2": ("Gemma2", {"attn_logit_softcapping": None, "sliding_window": 48}),
}
EXACT_FAMILIES = {
    "mistral windowed": ("Mistral", {"sliding_window": 48}, "sdpa", {"sliding window"}),
    "gemma2 capped": ("Gemma2", {"sliding_window": 48}, "eager", {"softcap"}),
    "gpt-oss": ("GptOss", {"num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 48}, "eager", {"sinks"}),
}


def plain(model: nn.Module) -> Tensor:
    return model(tokens()).logits


def padded(model: nn.Module) -> Tensor:
    return model(tokens(), attention_mask=left_padding()).logits[left_padding().bool()]


def right_padded(model: nn.Module) -> Tensor:
    keep = left_padding().flip(1)
    return model(tokens(), attention_mask=keep).logits[keep.bool()]


def packed(model: nn.Module) -> Tensor:
    return model(tokens(1), position_ids=packed_positions(), use_cache=False).logits


def packed_rows(model: nn.Module) -> Tensor:
    return model(tokens(2), position_ids=packed_positions(2), use_cache=False).logits


def chunked(model: nn.Module, keep: Tensor | None = None) -> Tensor:
    cache, chunks = transformers.DynamicCache(config=model.config), []
    for start, stop in ((0, 150), (150, 151), (151, LENGTH)):
        mask = None if keep is None else keep[:, :stop]
        chunks.append(model(tokens()[:, start:stop], attention_mask=mask, past_key_values=cache).logits)
    logits = torch.cat(chunks, dim=1)
    return logits if keep is None else logits[keep.bool()]


def chunked_padded(model: nn.Module) -> Tensor:
    return chunked(model, left_padding())


def static(model: nn.Module, keep: Tensor | None = None) -> Tensor:
    cache, chunks = transformers.StaticCache(config=model.config, max_cache_len=LENGTH + 50), []
    for start, stop in ((0, 150), (150, LENGTH)):
        mask = None if keep is None else keep[:, :stop]
        chunks.append(model(tokens()[:, start:stop], attention_mask=mask, past_key_values=cache).logits)
    logits = torch.cat(chunks, dim=1)
    return logits if keep is None else logits[keep.bool()]


def static_padded(model: nn.Module) -> Tensor:
    return static(model, left_padding())


def generate(model: nn.Module, **options: object) -> Tensor:
    out = model.generate(
        tokens(),
        attention_mask=left_padding(),
        max_new_tokens=4,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )
    return torch.cat([torch.stack(out.logits, dim=1).flatten(), out.sequences.flatten()])


def generate_static(model: nn.Module) -> Tensor:
    return generate(model, cache_implementation="static")


def generate_beams(model: nn.Module) -> Tensor:
    return generate(model, num_beams=3)


SCENARIOS = [plain, padded, right_padded, packed, packed_rows, chunked, chunked_padded, static, static_padded]
SCENARIOS += [generate, generate_static, generate_beams]


@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_full_budget_matches_sdpa_and_a_small_one_is_seen(family: str, scenario: Callable) -> None:
    model = build(*FAMILIES[family])
    # Gemma 2 refuses sdpa even without capping
    model.set_attn_implementation("eager" if family == "gemma2" else "sdpa")
    reference = scenario(model)
    with use(model, FULL) as calls:
        assert_exact(scenario(model), reference)
    assert calls.counts.approximated > 0
    with use(model, SMALL) as calls:
        assert (scenario(model) - reference).abs().max() > 1e-2
    assert calls.counts.approximated > 0
    assert torch.equal(scenario(model), reference)


# gpt-oss does not give its mask where packed documents start, so packing has no reference there
@pytest.mark.parametrize("scenario", [plain, padded, chunked, static_padded, generate_static])
@pytest.mark.parametrize("family", EXACT_FAMILIES)
@torch.no_grad()
def test_what_the_method_must_not_answer_is_exact_and_counted(family: str, scenario: Callable) -> None:
    name, options, implementation, reasons = EXACT_FAMILIES[family]
    model = build(name, options)
    model.set_attn_implementation(implementation)
    reference = scenario(model)
    with pytest.warns(UserWarning, match="no attention call was approximated"), use(model, SMALL) as calls:
        assert_exact(scenario(model), reference)
    assert reasons <= calls.counts.exact.keys() <= reasons | {"single query"}
    assert calls.counts.share_approximated == 0


@pytest.mark.parametrize("family", ["mistral windowed", "gemma2 capped"])
@torch.no_grad()
def test_packed_windows_and_caps_are_exact(family: str) -> None:
    name, options, implementation, reasons = EXACT_FAMILIES[family]
    model = build(name, options)
    model.set_attn_implementation(implementation)
    reference = packed_rows(model)
    with pytest.warns(UserWarning, match="no attention call was approximated"), use(model, SMALL) as calls:
        assert_exact(packed_rows(model), reference)
    assert calls.counts.exact.keys() == reasons


@torch.no_grad()
def test_bidirectional_models_are_approximated_without_causality() -> None:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=97, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
    )
    model = transformers.BertModel(config).eval()
    model.set_attn_implementation("sdpa")

    def encode() -> Tensor:
        keep = left_padding()
        return model(tokens(), attention_mask=keep).last_hidden_state[keep.bool()]

    reference = encode()
    with use(model, FULL) as calls:
        assert_exact(encode(), reference)
    assert calls.counts.approximated == config.num_hidden_layers
