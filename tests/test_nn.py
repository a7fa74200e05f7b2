"""The module of attention: any method runs in it, trains in it, and takes the weights that another was trained with."""

import pytest
import torch
from torch import Tensor, nn

import hyperattention as ha
from assertions import assert_exact, assert_same_bits
from hyperattention import select
from hyperattention.nn import MultiheadAttention

METHODS = {
    "exact": None,
    "LevAttention": ha.LevAttention(6),
    "all keys": ha.LevAttention(20),
    "softmax over the set": ha.Method(select.UniversalSet(6), tile=32),
    "draws": ha.Method(ha.Draw(6), tile=32),
}


def tokens(batch: int = 2, num: int = 20, width: int = 16) -> Tensor:
    return torch.randn(batch, num, width, generator=torch.Generator().manual_seed(0))


def module(method: ha.AttentionMethod | None = None, **options) -> MultiheadAttention:
    torch.manual_seed(0)
    return MultiheadAttention(16, 4, method, **options)


@pytest.mark.parametrize("causal", [False, True])
def test_exact_attention_is_that_of_torch(causal):
    ours, theirs, x = module(is_causal=causal), nn.MultiheadAttention(16, 4, batch_first=True), tokens()
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([ours.q_proj.weight, ours.k_proj.weight, ours.v_proj.weight]))
        theirs.in_proj_bias.copy_(torch.cat([ours.q_proj.bias, ours.k_proj.bias, ours.v_proj.bias]))
        theirs.out_proj.load_state_dict(ours.out_proj.state_dict())
        live = torch.ones(2, 20, dtype=torch.bool)
        live[1, 15:] = False
        hidden = ~torch.ones(20, 20, dtype=torch.bool).tril() if causal else None
        expected, _ = theirs(x, x, x, key_padding_mask=~live, attn_mask=hidden, need_weights=False)
        assert_exact(ours(x, live), expected)


@pytest.mark.parametrize("name", METHODS)
def test_it_learns_with_every_method(name):
    torch.manual_seed(1)
    attention = MultiheadAttention(16, 4, METHODS[name], kv_heads=2)
    head, x = nn.Linear(16, 2), tokens(16)
    # which of two tokens is larger in one coordinate
    label = (x[:, 3, 0] > x[:, 7, 0]).long()
    x[:, 3, 5:] += 3
    parameters = [*attention.parameters(), *head.parameters()]
    optimiser = torch.optim.Adam(parameters, lr=0.02)
    losses = []
    for step in range(30):
        loss = nn.functional.cross_entropy(head(attention(x, seed=step).mean(1)), label)
        optimiser.zero_grad()
        loss.backward()
        if not step:
            for parameter in parameters:
                assert parameter.grad is not None
                assert torch.isfinite(parameter.grad).all()
            # each projection, the keys' among them, changes the loss
            assert all(p.grad.abs().max() > 0 for n, p in attention.named_parameters() if n != "k_proj.bias")
        optimiser.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) / 5 < 0.7 * losses[0]


def test_weights_move_between_methods():
    state = module().state_dict()
    assert list(state) == [f"{name}_proj.{part}" for name in ("q", "k", "v", "out") for part in ("weight", "bias")]
    assert list(module(bias=False).state_dict()) == [f"{name}_proj.weight" for name in ("q", "k", "v", "out")]
    x = tokens()
    for method in (ha.LevAttention(6), ha.Method(ha.Draw(6), tile=32)):
        other = module(method)
        other.load_state_dict(state)
        assert not torch.equal(other(x), module()(x))
    assert module(kv_heads=2).k_proj.weight.shape == module(kv_heads=2).v_proj.weight.shape == (8, 16)


def test_the_seed_and_the_layer_decide_the_draws():
    x, drawn = tokens(), ha.Method(ha.Draw(6), tile=32)
    first = module(drawn)(x, seed=3)
    torch.manual_seed(99)
    assert_same_bits(module(drawn)(x, seed=3), first)
    assert not torch.equal(module(drawn)(x, seed=4), first)
    assert not torch.equal(module(drawn, layer=1)(x, seed=3), first)


def test_it_prints_its_method():
    text = repr(module(ha.LevAttention(6), kv_heads=2, is_causal=True))
    assert "16, 4, kv_heads=2, is_causal=True, method=LevAttention(num=6, p=2, epsilon=None, online=False)" in text
    assert "16, 4, is_causal=False, method=Exact()" in repr(module())


def test_wrong_sizes_methods_and_tokens_are_refused():
    with pytest.raises(ValueError, match="embed_dim=18 is no multiple of num_heads=4"):
        MultiheadAttention(18, 4)
    with pytest.raises(ValueError, match="num_heads=4 is no multiple of kv_heads=3"):
        MultiheadAttention(16, 4, kv_heads=3)
    for wrong in (0, -4):
        with pytest.raises(
            ValueError, match=rf"MultiheadAttention\(num_heads={wrong}\): num_heads must be a positive integer"
        ):
            MultiheadAttention(16, wrong)
    with pytest.raises(ValueError, match=r"x has shape \(2, 20, 12\): it must be \[batch, tokens, embed_dim=16\]"):
        module()(tokens(width=12))


def test_a_stage_is_no_method():
    with pytest.raises(TypeError):
        MultiheadAttention(16, 4, ha.Window(8))
