"""How long a text a model was made for, and what a compressed cache does beyond it."""

from importlib import import_module

import pytest
import torch

import hyperattention as ha
from test_hyper_cache import LIVE, NEW, PADDING, PROMPT, SMALL, cache_of, generate, with_cache
from tiny_models import build, tokens

transformers = pytest.importorskip("transformers")
trained_length = import_module("hyperattention.integrations.transformers.trained_length").trained_length
integration = import_module("hyperattention.integrations.transformers")


def test_beyond_the_length_of_the_model_only_if_asked() -> None:
    model = build("Llama", {"max_position_embeddings": PROMPT + 3})
    with pytest.raises(ValueError, match=r"the text has 64 tokens, but the model was made for 63: .* or allow_longer=True"):
        with_cache(model, cache_of(model))
    cache = integration.HyperCache(model.config, allow_longer=True, **SMALL)
    assert with_cache(model, cache).shape[1] == PROMPT + NEW
    assert not any(store.is_whole for store in cache.stores.values())


@pytest.mark.parametrize(("new", "refused"), [(NEW, False), (NEW + 2, True)])
def test_padding_is_no_part_of_the_length(new: int, refused: bool) -> None:
    model = build("Llama", {"max_position_embeddings": PROMPT - PADDING + NEW})
    cache, row = cache_of(model), tokens(2, PROMPT)[1:]
    options = {"max_new_tokens": new, "do_sample": False, "attention_mask": LIVE[1:], "past_key_values": cache}
    with integration.use(model, ha.Exact()):
        if refused:
            with pytest.raises(ValueError, match="the text has 68 tokens"):
                model.generate(row, **options)
        else:
            assert model.generate(row, **options).shape[1] == PROMPT + NEW


def test_guesses_taken_back_do_not_count() -> None:
    model = build("Llama", {"max_position_embeddings": PROMPT + NEW})
    assert with_cache(model, cache_of(model), "prompt lookup").shape[1] == PROMPT + NEW


def test_a_cache_that_is_reset_begins_anew() -> None:
    model = build("Llama", {"max_position_embeddings": PROMPT + NEW})
    cache = cache_of(model)
    first = with_cache(model, cache)
    cache.reset()
    assert torch.equal(with_cache(model, cache), first)
    assert first.shape[1] == PROMPT + NEW


@pytest.mark.parametrize(
    ("rope", "length"),
    [
        ({"rope_type": "default"}, 64),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, 256),
        ({"rope_type": "linear", "factor": 2.0}, 128),
        ({"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 4}, 64),
        ({"full_attention": {"rope_type": "linear", "factor": 8.0}, "sliding_attention": {"rope_type": "default"}}, 512),
    ],
)
def test_positions_that_are_stretched_reach_further(rope: dict[str, object], length: int) -> None:
    config = transformers.LlamaConfig(max_position_embeddings=64)
    config.rope_parameters = rope
    assert trained_length(config) == length


def test_a_configuration_may_name_no_length() -> None:
    assert trained_length(transformers.PreTrainedConfig()) is None


def test_a_stretched_model_reads_as_with_a_dynamic_cache() -> None:
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 1e4}
    model = build("Qwen2", {"max_position_embeddings": 32, "rope_parameters": rope})
    cache = cache_of(model, budget=PROMPT + NEW)
    with pytest.warns(UserWarning, match="no attention call was approximated"):
        assert torch.equal(with_cache(model, cache), generate(model))
