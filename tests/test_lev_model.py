"""LevAttention in a pretrained-style model and over pages: what works gives the same rows, and what does not says so."""

from importlib import import_module

import pytest
import torch
from torch import Tensor

import hyperattention as ha
from assertions import assert_exact
from hyperattention.integrations.transformers import use

transformers = pytest.importorskip("transformers")

METHODS = {"chosen by all keys": ha.LevAttention(16), "no look-ahead": ha.LevAttention(16, online=True)}


@pytest.mark.parametrize("method", METHODS.values(), ids=list(METHODS))
def test_a_model_reads_the_rows_of_lev_attention(method):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model, ids = transformers.LlamaForCausalLM(config).double().eval(), torch.randint(64, (1, 90))
    layer, seen = model.model.layers[0].self_attn, {}
    for name in ("q_proj", "k_proj", "v_proj"):
        layer.get_submodule(name).register_forward_hook(lambda _, __, out, name=name: seen.__setitem__(name, out))
    layer.o_proj.register_forward_pre_hook(lambda _, inputs: seen.__setitem__("rows", inputs[0]))
    with torch.no_grad(), use(model, method):
        model(ids)
    q, k, v = (seen[name].unflatten(2, (-1, 16)).transpose(1, 2) for name in ("q_proj", "k_proj", "v_proj"))
    cos, sin = model.model.rotary_emb(v, torch.arange(90)[None])
    llama = import_module("transformers.models.llama.modeling_llama")
    q, k = llama.apply_rotary_pos_emb(q, k, cos, sin)
    expected: Tensor = ha.attention(q, k, v, is_causal=True, enable_gqa=True, method=method)
    assert_exact(seen["rows"], expected.transpose(1, 2).flatten(2))
    exact = ha.attention(q, k, v, is_causal=True, enable_gqa=True)
    assert not torch.allclose(expected, exact, atol=1e-3)


def test_pages_are_refused_with_a_remedy():
    pages, table = torch.randn(2, 2, 16, 8), torch.zeros(1, 1, dtype=torch.int32)
    starts, lengths = torch.tensor([0, 3], dtype=torch.int32), torch.tensor([3], dtype=torch.int32)
    with pytest.raises(
        NotImplementedError, match=r"LevAttention\(num=4.*does not read pages: use Exact\(\), a Method of stages"
    ):
        ha.paged_attention(torch.randn(3, 4, 8), pages, pages, table, starts, lengths, method=ha.LevAttention(4))
