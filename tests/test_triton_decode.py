"""The Triton kernels of a decoding step, in the interpreter: what they compute is what PyTorch's operators compute."""

from dataclasses import astuple, replace

import pytest
import torch
from torch import Tensor

from assertions import assert_exact, assert_same_math
from hyperattention.cache.budget import CacheBudget
from hyperattention.cache.compressing import CompressingStore
from hyperattention.cache.page_rank import Bounds, Midpoint, TwoLevels
from hyperattention.cache.score_rule import ScoreRule
from hyperattention.cache.store import Store
from hyperattention.coreset import Coreset
from hyperattention.kernels.decode.operator import decode_coreset, decodes_fused
from hyperattention.kernels.decode.page_plan import PagePlan
from hyperattention.kernels.decode.reference import attend_to_pages, best_pages
from hyperattention.policies.cluster_means import ClusterMeans
from hyperattention.policies.top_pages import TopPages

pytestmark = pytest.mark.usefixtures("triton_kernel")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BATCH, HEADS, KV_HEADS, SLOTS, WIDTH, VALUE_WIDTH, SCALE = 2, 6, 2, 150, 20, 12, 0.3
ROOM = CacheBudget(96, sinks=5, window=20)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dense(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, rule: ScoreRule) -> tuple[Tensor, Tensor]:
    """Attention in the dtype of the queries; bias is log-weights, ``[batch, heads, queries, keys]``."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = rule.cap(q @ k.transpose(2, 3) * SCALE) + bias.to(q.dtype)
    if rule.sinks is not None:
        # the sinks' share goes to no key
        scores = torch.cat([scores, rule.sinks.to(q.dtype)[None, :, None, None].expand(*scores.shape[:3], 1)], 3)
        v = torch.cat([v, v.new_zeros(*v.shape[:2], 1, v.shape[3])], 2)
    lse = torch.logsumexp(scores.double(), -1)
    return torch.softmax(scores, -1).nan_to_num(0.0) @ v, lse


def coreset(queries: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, k = normal(BATCH, HEADS, queries, WIDTH), normal(BATCH, KV_HEADS, SLOTS, WIDTH, seed=1)
    v, weight = normal(BATCH, KV_HEADS, SLOTS, VALUE_WIDTH, seed=2), normal(BATCH, KV_HEADS, SLOTS, seed=3)
    # a gap of whole blocks, and a head without keys
    weight[0, 1, 10:140] = weight[1, 0] = -torch.inf
    return q, k, v, weight


@pytest.fixture
def split(monkeypatch):
    """Let lists be split between this many programs."""
    from hyperattention.kernels.decode import triton_coreset, triton_pages

    def between(splits: int) -> None:
        for module in (triton_coreset, triton_pages):
            monkeypatch.setattr(module, "splits_of", lambda *sizes: splits)

    return between


@pytest.fixture
def launched(monkeypatch) -> list[str]:
    """List the kernels that are launched."""
    from hyperattention.kernels.launch import Launch

    names, run = [], Launch.run

    def watched(self):
        names.append(self.kernel.fn.__name__)
        run(self)

    monkeypatch.setattr(Launch, "run", watched)
    return names


@pytest.mark.parametrize(
    ("dtype", "queries", "splits"),
    [(torch.float32, 1, 1), (torch.float16, 3, 2)]
    + [pytest.param(dtype, 1, 3, marks=pytest.mark.heavy) for dtype in DTYPES]
    + [pytest.param(dtype, 3, 2, marks=pytest.mark.heavy) for dtype in DTYPES[:2]],
    ids=str,
)
def test_a_coreset_gets_the_attention_of_its_weights(dtype: torch.dtype, queries: int, splits: int, split) -> None:
    split(splits)
    q, k, v, weight = coreset(queries)
    place = torch.arange(SLOTS)
    bias = weight.repeat_interleave(3, 1)[:, :, None].expand(-1, -1, queries, -1)
    bias = bias.masked_fill(place > SLOTS - queries + torch.arange(queries)[:, None], -torch.inf)
    x = q.to(dtype), k.to(dtype), v.to(dtype)
    # queries as a model gives them: heads within tokens
    given = (x[0].transpose(1, 2).contiguous().transpose(1, 2), *x[1:], weight.float())
    rules = ScoreRule(), ScoreRule(2.0, normal(HEADS, seed=4).float())
    for rule in rules if dtype == torch.float32 or splits == 3 else rules[1:]:
        out, lse = decode_coreset(*given, None, rule.sinks, SCALE, True, rule.softcap)
        truth = dense(x[0].double(), x[1].double(), x[2].double(), bias.float().double(), rule)
        plain = dense(*x, bias, rule)
        assert_same_math(out, truth[0], plain[0])
        assert_same_math(lse, truth[1], dense(x[0].float(), x[1].float(), x[2].float(), bias, rule)[1].float())


def test_slots_beyond_a_length_do_not_count(split) -> None:
    split(2)
    q, k, v, weight = (x.float() for x in coreset(2))
    length = torch.tensor([[SLOTS, 70], [1, 64]])
    # what lies beyond may be anything finite
    ours = decode_coreset(q, k, v, weight.zero_(), length, None, SCALE, False, None)
    hidden = torch.where(torch.arange(SLOTS) < length[..., None], 0.0, -torch.inf)
    theirs = decode_coreset(q, k, v, hidden, None, None, SCALE, False, None)
    for a, b in zip(ours, theirs, strict=True):
        assert_exact(a, b)


@pytest.mark.heavy
def test_a_part_without_keys_changes_nothing(split) -> None:
    q, k, v, weight = (x.float() for x in coreset(1))
    split(1)
    whole = decode_coreset(q, k, v, weight, None, None, SCALE, False, None)
    # more programs than blocks of keys
    split(5)
    for a, b in zip(whole, decode_coreset(q, k, v, weight, None, None, SCALE, False, None), strict=True):
        assert_exact(a, b)


def paged(by, queries: int, *, padding: int = 37, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, PagePlan]:
    k, v = normal(BATCH, KV_HEADS, 203, WIDTH, seed=seed), normal(BATCH, KV_HEADS, 203, VALUE_WIDTH, seed=seed + 1)
    recent = (203 - queries - 20) // 8 * 8
    summary = by.summarise(k[:, :, :recent].unflatten(2, (-1, 8)))
    plan = PagePlan(page=8, sinks=5, recent=recent, seen=203, num=6)
    return normal(BATCH, HEADS, queries, WIDTH, seed=seed + 2), k, v, summary, torch.tensor([0, padding]), plan


def attend(q: Tensor, k: Tensor, v: Tensor, summary: Tensor, begin: Tensor, plan: PagePlan, by, rule: ScoreRule):
    from hyperattention.kernels.decode.operator import decode_best_pages

    return decode_best_pages(q, k, v, summary, begin, rule.sinks, list(astuple(plan)), by.kernel_reach, SCALE, rule.softcap)


def chosen_in_pytorch(q: Tensor, summary: Tensor, begin: Tensor, plan: PagePlan, by, rule: ScoreRule) -> Tensor:
    rows = q.unflatten(1, (KV_HEADS, -1))
    score = rule.cap(by.rank(rows.flatten(2, 3) * SCALE, summary, plan.num)).unflatten(2, rows.shape[2:4])
    return best_pages(score, begin, plan)


@pytest.mark.parametrize(
    ("dtype", "by", "queries", "splits"),
    [(torch.bfloat16, Bounds(0.5), 1, 1)]
    + [
        pytest.param(dtype, *others, marks=pytest.mark.heavy)
        for dtype in DTYPES
        for others in ((Bounds(1.0), 3, 3), (Midpoint(), 1, 2))
    ],
    ids=str,
)
def test_the_best_pages_are_read_where_they_lie(dtype: torch.dtype, by, queries: int, splits: int, split) -> None:
    split(splits)
    q, k, v, summary, begin, plan = paged(by, queries)
    x = q.to(dtype), k.to(dtype), v.to(dtype), summary.to(dtype)
    rule = ScoreRule(2.0, normal(HEADS, seed=4).float()) if splits == 3 else ScoreRule()
    out, lse, chosen = attend(*x, begin, plan, by, rule)
    wide = x[0].double(), x[1].double(), x[2].double(), x[3].double()
    assert torch.equal(chosen.long(), chosen_in_pytorch(wide[0], wide[3], begin, plan, by, rule))
    truth, whole = attend_to_pages(wide[0], (wide[1], wide[2]), chosen, begin, plan, SCALE, rule.softcap)
    # the keys that are read, as a mask
    page = torch.arange(203) // 8
    read = (page == chosen[..., None]).any(2) & (page < plan.recent // 8)  # [lists, queries, keys]
    place, first = torch.arange(203), begin.repeat_interleave(KV_HEADS)[:, None, None]
    read = read & (place >= first) | (place >= plan.recent) | ((place < first + 5) & (place >= first))
    read = read & (place <= 203 - queries + torch.arange(queries)[:, None])
    bias = torch.where(read, 0.0, -torch.inf).unflatten(0, (BATCH, KV_HEADS)).repeat_interleave(3, 1)
    plain, exact = (dense(y[0], y[1], y[2], bias, rule) for y in (x, wide))
    assert_same_math(out, exact[0], plain[0])
    assert_same_math(lse, exact[1], dense(x[0].float(), x[1].float(), x[2].float(), bias, rule)[1].float())
    if rule.sinks is None:
        assert_exact(truth, exact[0])
        assert_exact(whole, exact[1])


@pytest.mark.heavy
@pytest.mark.parametrize("padding", [0, 180, 203])
def test_pages_that_are_missing_are_named_and_not_read(padding: int, split) -> None:
    split(2)
    by, rule = Bounds(0.5), ScoreRule()
    *x, begin, plan = paged(by, 1, padding=padding)
    q, k, v, summary = (each.float() for each in x)
    # more than there are pages
    plan = replace(plan, num=30)
    out, lse, chosen = attend(q, k, v, summary, begin, plan, by, rule)
    assert torch.equal(chosen.long(), chosen_in_pytorch(q, summary, begin, plan, by, rule))
    assert (chosen[:, :, 0] == -1).all()
    truth = attend_to_pages(q, (k, v), chosen, begin, plan, SCALE, None)
    assert_exact(out, truth[0])
    assert_exact(lse, truth[1])


@pytest.mark.heavy
def test_of_equal_pages_the_first_are_chosen(split) -> None:
    """The number of pages is the one that was asked for, whatever is equal."""
    split(1)
    by = Bounds(0.5)
    q, k, v, summary, begin, plan = paged(by, 1, padding=0)
    better = summary[:, :, 3:4].expand(summary.shape).clone()
    better[:, :, [4, 17]] = 0.1 * summary[:, :, 3:4]
    score = by.rank(q.unflatten(1, (KV_HEADS, -1)).flatten(2, 3) * SCALE, better, plan.num)
    chosen = attend(q.float(), k.float(), v.float(), better.float(), begin, plan, by, ScoreRule())[2]
    alike = torch.log_softmax(score, -1).amax(2)[:, :, [3, 4]].flatten(0, 1)
    for row, (same, other) in zip(chosen[:, 0].tolist(), alike.tolist(), strict=True):
        first = [4, 17] if other > same else []
        rest = [page for page in range(22) if page not in (4, 17)]
        assert row == sorted(first + rest[: plan.num - len(first)])


def steps(store: Store, num: int = 3) -> list[Tensor]:
    k = normal(BATCH, KV_HEADS, 200 + num, WIDTH).float()
    store.append(k[:, :, :200], k[:, :, :200])
    store.end_step(normal(BATCH, HEADS, 200, WIDTH, seed=5).float(), SCALE)
    found = []
    for at in range(200, 200 + num):
        key, q = k[:, :, at : at + 1], normal(BATCH, HEADS, 1, WIDTH, seed=at).float()
        store.append(key, key)
        part = store.attend(q, SCALE)
        store.end_step(q, SCALE)
        found += [part.out, part.lse]
    return found


def stores() -> dict[str, tuple[Store, list[str]]]:
    above = TopPages(share=2, first=0).store(ROOM, 0, 0, None)
    above.chosen = torch.tensor([[[-1, 1, 3]]]).expand(BATCH * KV_HEADS, 1, 3)
    above_room = replace(ROOM, budget=ROOM.sinks + ROOM.window + 4 * 8)
    return {
        "coreset": (CompressingStore(ClusterMeans(), ROOM), ["_coreset_kernel", "_merge_kernel"]),
        "pages": (TopPages().store(ROOM, 0, 0, None), ["_rank_kernel", "_pages_kernel"]),
        "two levels": (TopPages(by=TwoLevels()).store(ROOM, 0, 0, None), ["_pages_kernel", "_merge_kernel"]),
        "borrowed": (TopPages(share=2, first=0).store(above_room, 1, 0, above), ["_pages_kernel", "_merge_kernel"]),
    }


@pytest.mark.parametrize(
    "name", ["borrowed", "pages", *(pytest.param(name, marks=pytest.mark.heavy) for name in ("coreset", "two levels"))]
)
def test_a_step_of_a_store_takes_its_kernels_and_no_others(name: str, launched: list[str], split, monkeypatch) -> None:
    split(3)
    store, kernels = stores()[name]
    ours = steps(store)
    assert launched == 3 * kernels
    with monkeypatch.context() as patch:
        from hyperattention.kernels.decode import operator

        patch.setattr(operator, "triton_reads", lambda *tensors: False)
        theirs = steps(stores()[name][0])
    assert launched == 3 * kernels
    for a, b in zip(ours, theirs, strict=True):
        assert_exact(a, b)


def test_gradients_many_rows_and_mixed_dtypes_take_other_paths() -> None:
    q, k, v, weight = (x.float() for x in coreset(1))
    assert decodes_fused(q, k, v)
    assert not decodes_fused(q.requires_grad_(), k, v)
    with torch.no_grad():
        assert decodes_fused(q, k, v)
    out = Coreset(*(x[:, :, :8] for x in (k, v, weight))).attend(q).out
    assert torch.autograd.grad(out.sum(), q)[0].shape == q.shape
    many = torch.zeros(BATCH, HEADS, 22, WIDTH)
    assert not decodes_fused(many, k, v)
    assert decodes_fused(many[:, :, :21], k, v)
    assert not decodes_fused(q.detach().half(), k, v)
