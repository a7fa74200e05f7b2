"""A cache that keeps everything and reads the best pages."""

import pytest
import torch
from torch import Tensor

from assertions import assert_exact, assert_same_bits, assert_unbiased
from hyperattention.cache.budget import CacheBudget
from hyperattention.cache.page_rank import Bounds, Midpoint, TwoLevels
from hyperattention.cache.selecting import SelectingStore
from hyperattention.policies.top_pages import TopPages

KEYS, PAGE, ROOM = 203, 8, CacheBudget(64, sinks=3, window=10)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def store(policy: TopPages | None = None, *, batch: int = 2, seed: int = 0, room: CacheBudget = ROOM) -> SelectingStore:
    made = (policy or TopPages()).store(room, 0, seed, None)
    assert isinstance(made, SelectingStore)
    k, v = normal(batch, 2, KEYS, 16), normal(batch, 2, KEYS, 4, seed=1)
    for start in range(0, KEYS, 50):
        made.append(k[:, :, start : start + 50], v[:, :, start : start + 50])
        made.end_step(k[:, :, start : start + 50], 1.0)
    return made


def step(made: SelectingStore, queries: int = 1, seed: int = 5) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Append some tokens and attend from them: queries, keys, values, output."""
    batch = made.batch
    q, k, v = (
        normal(batch, 4, queries, 16, seed=seed),
        normal(batch, 2, queries, 16, seed=6),
        normal(batch, 2, queries, 4, seed=7),
    )
    keys, values = made.append(k, v)
    return q, keys, values, made.attend(q, 0.25).out


@pytest.mark.parametrize("queries", [1, 5])
def test_a_query_reads_sinks_window_and_its_pages_and_nothing_else(queries: int) -> None:
    made = store()
    q, keys, values, out = step(made, queries)
    assert not made.is_whole
    chosen = made.chosen.unflatten(0, (2, 2))  # [batch, kv_heads, queries, pages]
    assert chosen.shape[-1] == made.num_pages == (64 - 3 - 10 - 8) // 8
    place, seen = torch.arange(keys.shape[2]), keys.shape[2]
    recent = (seen - queries - 10) // PAGE * PAGE
    for i in range(queries):
        read = (place < 3) | (place >= recent) | (chosen[:, :, i, :, None] == place // PAGE).any(2)
        read = read & (place <= seen - queries + i)
        # no more than the budget, but for the other queries' own keys
        assert int(read.sum(-1).max()) <= ROOM.budget + queries
        mask = read.repeat_interleave(2, 1)[:, :, None]
        plain = torch.nn.functional.scaled_dot_product_attention(
            q[:, :, i : i + 1], keys, values, attn_mask=mask, scale=0.25, enable_gqa=True
        )
        assert_exact(out[:, :, i : i + 1], plain)


def test_the_key_that_a_query_looks_for_is_found() -> None:
    made = store()
    q = normal(2, 4, 1, 16, seed=5)
    made._k[:, :, 77] = 8 * q[:, ::2, 0]
    made._summary, made._summed = None, 0
    made.end_step(q, 1.0)
    made.append(normal(2, 2, 1, 16, seed=6), normal(2, 2, 1, 4, seed=7))
    made.attend(q, 0.25)
    assert bool((made.chosen == 77 // PAGE).any(-1).all())


def test_bounds_bound_and_shares_of_them_do_not_exceed_them() -> None:
    pages, q = normal(1, 1, 9, PAGE, 16), normal(1, 1, 4, 16, seed=1)
    best = torch.einsum("bhqd,bhpsd->bhqps", q, pages).amax(-1)
    bound = Bounds().rank(q, Bounds().summarise(pages), 3)
    assert bool((bound >= best - 1e-5).all())
    less = Bounds(0.3).rank(q, Bounds(0.3).summarise(pages), 3)
    assert bool((less < bound).all())
    middle = Midpoint(0.5).rank(q, Midpoint(0.5).summarise(pages), 3)
    assert_exact(middle, Bounds(0.0).rank(q, Bounds(0.0).summarise(pages), 3))


def test_two_levels_rank_as_one_what_they_do_not_rule_out() -> None:
    pages, q, by = normal(2, 1, 9, PAGE, 16), normal(2, 1, 4, 16, seed=1), TwoLevels(Bounds(), keep=0.4)
    summary = by.summarise(pages)
    score, plain = by.rank(q, summary, 2), Bounds().rank(q, summary, 2)
    kept = score > -torch.inf
    assert 2 <= int(kept[0, 0, 0].sum()) <= 4
    assert_exact(score[kept], plain[kept])
    assert bool((TwoLevels(Bounds(), keep=1.0).rank(q, summary, 2) == plain).all())


def test_draws_stand_for_what_the_pages_leave_out() -> None:
    estimates, truth = [], torch.zeros(())
    for seed in range(300):
        made = store(TopPages(draws=16), batch=1, seed=seed)
        q, k, v = normal(1, 4, 1, 16, seed=5), normal(1, 2, 1, 16, seed=6), normal(1, 2, 1, 4, seed=7)
        keys, values = made.append(k, v)
        part = made.attend(q, 0.05)
        total = part.lse.double().exp()
        estimates.append(torch.cat([total[..., None], total[..., None] * part.out.double()], -1))
        if not seed:
            weight = (q.double() @ keys.double().repeat_interleave(2, 1).transpose(2, 3) * 0.05).exp()
            truth = torch.cat([weight.sum(-1, keepdim=True), weight @ values.double().repeat_interleave(2, 1)], -1)
    spread = truth.abs().amax().item()
    assert_unbiased(torch.stack(estimates), truth, largest_error=0.05 * spread)


def test_padding_on_the_left_is_never_read_and_elsewhere_refused() -> None:
    room, k, v = CacheBudget(40, 3, 10), normal(2, 2, 100, 16), normal(2, 2, 100, 4, seed=1)
    made, alone = (TopPages().store(room, 0, 0, None) for _ in range(2))
    made.append(k, v)
    made.mask_padding(torch.arange(100) >= torch.tensor([[0], [24]]))
    made.end_step(k, 1.0)
    alone.append(k[1:, :, 24:], v[1:, :, 24:])
    alone.end_step(k[1:, :, 24:], 1.0)
    q, new, value = normal(2, 4, 1, 16, seed=5), normal(2, 2, 1, 16, seed=6), normal(2, 2, 1, 4, seed=7)
    made.append(new, value)
    alone.append(new[1:], value[1:])
    # 24 is a number of whole pages, so that both cut the same ones
    assert_exact(made.attend(q, 0.25).out[1:], alone.attend(q[1:], 0.25).out)
    made.append(new, value)
    with pytest.raises(ValueError, match="padding stands after tokens"):
        made.mask_padding(torch.tensor([[True], [False]]))


def test_rows_move_tokens_are_forgotten_and_states_go_on() -> None:
    made, other = store(), store()
    state = made.state()
    again = TopPages().store(ROOM, 0, 0, None)
    again.restore(state)
    assert_same_bits(step(made)[3], step(again)[3])
    made.crop(1)
    assert_same_bits(step(made)[3], step(other)[3])
    made.take_rows(torch.tensor([1, 1]))
    made.crop(1)
    out = step(made)
    assert made.batch == 2
    assert_exact(out[1][0], torch.cat([out[1][1, :, :-1], out[1][0, :, -1:]], 1))
    with pytest.raises(ValueError, match="cannot forget"):
        made.crop(10_000)
    with pytest.raises(ValueError, match="lacks"):
        again.restore({"k": state["k"]})


def test_long_steps_and_short_texts_read_everything() -> None:
    made = store()
    made.append(normal(2, 2, 40, 16), normal(2, 2, 40, 4))
    assert made.is_whole
    made.append(normal(2, 2, 1, 16), normal(2, 2, 1, 4))
    assert not made.is_whole
    short = TopPages().store(ROOM, 0, 0, None)
    short.append(normal(2, 2, 60, 16), normal(2, 2, 60, 4))
    short.append(normal(2, 2, 1, 16), normal(2, 2, 1, 4))
    assert short.is_whole


def test_neighbouring_layers_may_share_a_choice() -> None:
    policy, stores = TopPages(share=2, first=1), []
    for layer in range(4):
        stores.append(policy.store(ROOM, layer, 0, stores[-1] if stores else None))
    assert [made.lender for made in stores] == [None, None, stores[1], None]


def test_a_budget_without_a_page_is_refused() -> None:
    with pytest.raises(ValueError, match=r"budget=20 leaves no page of 8.*give at least 29"):
        TopPages().store(CacheBudget(20, 3, 10), 0, 0, None)
    with pytest.raises(ValueError, match="page"):
        TopPages(page=0)
    with pytest.raises(ValueError, match="reach=2"):
        Bounds(2.0)
