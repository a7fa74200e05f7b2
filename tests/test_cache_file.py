"""The file of a compressed cache: what was saved goes on as it would have, and nothing damaged is used."""

import copy
import os
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch import nn

import hyperattention as ha
from hyperattention import policies
from policies import POLICIES
from tiny_models import build, tokens

transformers = pytest.importorskip("transformers")
integration = import_module("hyperattention.integrations.transformers")
file = import_module("hyperattention.integrations.transformers.cache_file")

PROMPT = 60
KEEPINGS = {
    "pages": policies.TopPages(page=4, by=policies.TwoLevels(policies.Bounds(0.5))),
    "pages and draws": policies.TopPages(page=4, by=policies.Midpoint(), draws=4, share=2, first=0),
    "subgen": policies.SubGen(delta=3.0, samples=2, value_samples=4, most_clusters=99),
    "look once": policies.LookOnce(keep=0.7, latest=4, pages=policies.TopPages(page=4)),
}
EVERY = {case.name: case.policy for case in POLICIES} | KEEPINGS


@pytest.fixture
def model() -> nn.Module:
    return build("Llama", {})


def read(model: nn.Module, policy: object = None) -> object:
    cache = integration.HyperCache(model.config, budget=40, policy=policy, sinks=2, window=16, seed=3)
    with torch.no_grad(), pytest.warns(UserWarning, match="exact"), integration.use(model, ha.Exact()):
        model(tokens(2, PROMPT), past_key_values=cache)
    return cache


def go_on(model: nn.Module, cache: object) -> torch.Tensor:
    """Read on: the logits of every token; `test_cache_goes_on.py` compares what is written as well."""
    with torch.no_grad(), integration.use(model, ha.Exact()):
        return torch.cat([model(tokens(2, 99)[:, i : i + 1], past_key_values=cache).logits for i in range(70, 85)], 1)


@pytest.mark.parametrize("policy", EVERY.values(), ids=EVERY)
def test_what_was_saved_goes_on_as_it_would_have(model: nn.Module, tmp_path: Path, policy: object) -> None:
    cache = read(model, policy)
    file.save_cache(cache, model, tmp_path / "doc.safetensors", tokens=tokens(2, PROMPT))
    loaded, text = file.load_cache(tmp_path / "doc.safetensors", model)
    assert (loaded.policy, loaded.room, loaded.seed) == (cache.policy, cache.room, cache.seed)
    assert loaded.get_seq_length() == PROMPT
    assert torch.equal(text, tokens(2, PROMPT))
    assert torch.equal(go_on(model, loaded), go_on(model, cache))
    assert os.listdir(tmp_path) == ["doc.safetensors"]


def test_what_is_damaged_or_of_another_is_refused_before_any_use(model: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "doc.safetensors"
    file.save_cache(read(model), model, path)
    data = path.read_bytes()
    flipped = bytearray(data)
    flipped[-100] ^= 1
    newer = data.replace(b'"version":"1"', b'"version":"2"')
    assert newer != data
    damages = {
        "not a complete safetensors file": data[: len(data) // 2],
        "content does not match its checksum": bytes(flipped),
        "version is '2'": newer,
        "header too small": b"",
    }
    for message, content in damages.items():
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            file.load_cache(path, model)
    path.write_bytes(data)
    other = build("Llama", {})
    with torch.no_grad():
        other.lm_head.weight.add_(1.0)
    with pytest.raises(ValueError, match="written by another model: other weights"):
        file.load_cache(path, other)
    with pytest.raises(ValueError, match="num layers 2 there and 1 here"):
        file.load_cache(path, build("Llama", {"num_hidden_layers": 1}))
    with pytest.raises(ValueError, match="cannot read"):
        file.load_cache(tmp_path / "none", model)


def test_a_copy_is_read_by_whoever_reads_the_model(model: nn.Module) -> None:
    cache = read(model)
    with torch.no_grad(), integration.use(model, ha.Exact()) as calls:
        within = copy.deepcopy(cache)
        model(tokens(2, 99)[:, 70:71], past_key_values=copy.deepcopy(cache))
    assert calls.counts.approximated == 2
    # what is copied while the model reads weights does not let a model read on that no longer does
    with torch.no_grad(), pytest.raises(ValueError, match="cannot read the weights"):
        model(tokens(2, 99)[:, 70:71], past_key_values=within)
    assert torch.equal(go_on(model, copy.deepcopy(cache)), go_on(model, cache))


def interrupted(*_: object) -> None:
    raise KeyboardInterrupt


def write_half(path: Path, data: bytes) -> int:
    with path.open("wb") as opened:
        opened.write(data[: len(data) // 2])
    raise KeyboardInterrupt


@pytest.mark.parametrize("moment", ["half written", "before it is put in place"])
@pytest.mark.parametrize("old", [None, b"an old file"], ids=["no old file", "an old file"])
def test_an_interruption_leaves_what_was_there(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str, old: bytes | None
) -> None:
    cache, path = read(model), tmp_path / "doc.safetensors"
    if old is not None:
        path.write_bytes(old)
    where, name, what = (Path, "write_bytes", write_half) if moment == "half written" else (os, "replace", interrupted)
    with monkeypatch.context() as patched:
        patched.setattr(where, name, what)
        with pytest.raises(KeyboardInterrupt):
            file.save_cache(cache, model, path, overwrite=True)
    assert os.listdir(tmp_path) == ([] if old is None else ["doc.safetensors"])
    assert old is None or path.read_bytes() == old


def test_what_cannot_be_saved_is_refused(model: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "doc.safetensors"
    with pytest.raises(ValueError, match="hold no keys"):
        file.save_cache(integration.HyperCache(model.config, budget=400), model, path)
    with pytest.raises(ValueError, match="give all 60"):
        file.save_cache(read(model), model, path, tokens=tokens(2, 10))
    config = transformers.models.mllama.configuration_mllama.MllamaTextConfig(
        num_hidden_layers=3, cross_attention_layers=[1]
    )
    with pytest.raises(ValueError, match=r"layers \{1: 'DynamicLayer'\} of LlamaForCausalLM are of kinds"):
        file.check_savable(integration.HyperCache(config, budget=400), model)
    assert not path.exists()
