"""Tiny random models of each family, run through `use`, against transformers' own exact attention."""

import subprocess
import sys
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import hyperattention as ha

transformers = pytest.importorskip("transformers")
integration = pytest.importorskip("hyperattention.integrations.transformers")
masks = pytest.importorskip("hyperattention.integrations.transformers_masks")
use = integration.use

NUM_LAYERS, LENGTH, VOCABULARY = 2, 320, 97
FULL = ha.Method(ha.Sinks(4), ha.Window(4096))
SMALL = ha.Method(ha.Sinks(4), ha.Window(16), ha.Draw(16, by=ha.Uniform()))
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 1024,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    # wide enough for heads that are not uniform, so that dropping keys shows
    "initializer_range": 0.2,
}
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


def build(family: str, options: dict) -> nn.Module:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SHAPE, **options)
    return getattr(transformers, f"{family}ForCausalLM")(config).eval()


def assert_exact(ours: Tensor, reference: Tensor) -> None:
    # float32 logits a few layers deep: two orders of summation differ by some rounding steps of the largest
    assert ours.shape == reference.shape
    assert (ours - reference).abs().max() <= 2e-5 * max(1.0, reference.abs().max().item())


def tokens(batch: int = 2, length: int = LENGTH) -> Tensor:
    return torch.randint(2, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(7))


def left_padding() -> Tensor:
    return (torch.arange(LENGTH) >= torch.tensor([[0], [77]])).long()


def packed_positions(batch: int = 1) -> Tensor:
    return torch.cat([torch.arange(n) for n in (100, 37, LENGTH - 137)]).expand(batch, -1)


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


@pytest.mark.parametrize("scenario", [plain, padded, packed, chunked, static_padded, generate_static])
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
