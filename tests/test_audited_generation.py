"""Generation through an audited cache: the same tokens, and a report."""

import copy
from pathlib import Path

import pytest
import torch

from hyperattention.policies.top_pages import TopPages

pytest.importorskip("transformers")

from safetensors.torch import load_file

from hyperattention.integrations.transformers.cache_file import load_cache, save_cache
from test_hyper_cache import HyperCache, cache_of, family, with_cache

ROOM = {"budget": 32, "sinks": 2, "window": 16}


@pytest.mark.parametrize("mode", ["greedy", "beams", "prompt lookup", "assistant", "chunked prefill"])
@pytest.mark.parametrize("policy", [None, TopPages(page=2)], ids=["means", "pages"])
def test_generation_goes_on_as_without_an_audit(mode: str, policy: TopPages | None) -> None:
    model = family("llama")
    plain = with_cache(model, cache_of(model, policy), mode)
    cache = HyperCache(model.config, policy=policy, **ROOM, audit=3)
    assert torch.equal(with_cache(model, cache, mode), plain)
    report = cache.report()
    assert 0 < report.num_audited < report.num_approximated < report.num_tokens
    assert 0 <= report.interval[0] <= report.relative_error <= report.interval[1]
    assert report.memory_bytes == cache.memory_bytes
    assert cache_of(model, policy).report() is None


def test_a_layer_that_borrows_its_choice_may_be_audited() -> None:
    model, policy = family("llama"), TopPages(page=2, share=2, first=0)
    outs = []
    for audit in (None, 3):
        cache = HyperCache(model.config, policy=policy, **ROOM, audit=audit)
        outs.append(with_cache(model, cache))
    assert torch.equal(*outs)
    first, second = (layer.inner for layer in cache.layers[:2])
    assert second.lender is first
    assert cache.report().num_audited > 0


def test_layers_of_a_copy_share_with_their_own_neighbours() -> None:
    model = family("llama")
    cache = HyperCache(model.config, policy=TopPages(page=2, share=2, first=0), **ROOM, audit=3)
    plain = with_cache(model, copy.deepcopy(cache))
    other = copy.deepcopy(cache)
    other.reset()
    first, second = (layer.inner for layer in other.layers[:2])
    assert second.lender is first
    assert first is not cache.layers[0].inner
    assert torch.equal(with_cache(model, other), plain)


def test_the_file_of_an_audited_cache_holds_no_copy(tmp_path: Path) -> None:
    model, files = family("llama"), [tmp_path / "plain", tmp_path / "audited"]
    for audit, file in zip((None, 3), files, strict=True):
        cache = HyperCache(model.config, **ROOM, audit=audit)
        with_cache(model, cache)
        save_cache(cache, model, file)
    plain, audited = (load_file(file) for file in files)
    assert plain.keys() == audited.keys()
    assert all(torch.equal(plain[name], audited[name]) for name in plain)
    loaded, _ = load_cache(files[1], model)
    assert loaded.report() is None
    with pytest.raises(ValueError, match="without audit="):
        cache.restore({number: store.state() for number, store in cache.stores.items()})


def test_a_cache_that_is_reset_is_audited_anew() -> None:
    model = family("llama")
    cache = HyperCache(model.config, **ROOM, audit=3)
    with_cache(model, cache)
    first = cache.report()
    cache.reset()
    assert cache.report().num_tokens == 0
    with_cache(model, cache)
    assert str(cache.report()) == str(first)
    with pytest.raises(ValueError, match=r"HyperCache\(audit=0\)"):
        HyperCache(model.config, **ROOM, audit=0)
