"""Tiny random transformers models and inputs, and the one tolerance by which their logits are compared."""

import pytest
import torch
from torch import Tensor, nn

import hyperattention as ha

transformers = pytest.importorskip("transformers")

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


def build(family: str, options: dict) -> nn.Module:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**(SHAPE | options))
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
