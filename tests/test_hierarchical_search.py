"""The hierarchical search: what stands for blocks, what is opened, and the law of the leaves."""

import pytest
import torch

import dense
import hyperattention as ha
from assertions import assert_exact
from front_door import with_audit
from hyperattention import select
from hyperattention.problem import Problem
from hyperattention.select.score import hierarchical_search, representatives
from hyperattention.select.score.leaves import Closed, Opened, leaves_of
from hyperattention.select.score.mass import inverse
from hyperattention.tiling import cut
from problems import problem, tensors
from test_value_norm import tokens

LEVELS = (select.Level(64, 4, select.Representatives(1, 3)), select.Level(16, 4, select.Representatives(2, 2)))


def haystack(num: int, place: int, *, sharp: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keys of which one, at `place`, is unlike the others and what the last tile looks for; values tell it from the rest."""
    k = torch.nn.functional.normalize(tokens(1, 1, num, 16).float(), dim=-1)
    k[..., -1] = 0.2 * tokens(1, 1, num, 1, seed=2)[..., 0]
    k[:, :, place] = 1.5 * torch.eye(16)[-1]
    q = tokens(1, 1, num, 16, seed=1).float()
    q[:, :, -64:] = sharp * k[:, :, place : place + 1]
    v = torch.zeros(1, 1, num, 1)
    v[:, :, place] = 1.0
    return q, k, v


@pytest.mark.parametrize("place", [70, 500, 1333])
def test_the_one_key_that_queries_look_for_is_found_and_listed_for_certain(place):
    q, k, v = haystack(2048, place, sharp=64.0)
    method = ha.Method(ha.Sinks(4), ha.Window(64), ha.Draw(128, by=ha.HierarchicalSearch(LEVELS)))
    assert method.cost(2048).share_of_exact < 1
    found = [ha.attention(q, k, v, is_causal=True, method=method, seed=seed)[0, 0, -1, 0].item() for seed in range(8)]
    assert min(found) > 0.9
    # weight one, not the weight of a key that happened to be drawn
    for seed in range(8):
        weights = dense.weights(method, Problem(q, k, v, 1.0, causal=True, seed=seed))
        assert weights[0, 0, -1, place] == 1.0


def test_means_alone_miss_what_far_keys_find():
    found = {0: [], 3: []}
    for place in range(100, 1900, 150):
        q, k, v = haystack(2048, place, sharp=64.0)
        for far, outs in found.items():
            by = ha.HierarchicalSearch((select.Level(64, 4, select.Representatives(1, far)),))
            method = ha.Method(ha.Sinks(4), ha.Window(64), ha.Draw(512, by=by))
            outs.append(ha.attention(q, k, v, is_causal=True, method=method)[0, 0, -1, 0].item())
    assert min(found[3]) > 0.9
    assert sum(found[0]) < 0.5 * len(found[0])


def test_far_keys_are_the_farthest_from_all_others():
    keys = torch.zeros(1, 1, 8, 2)
    keys[0, 0, 5], keys[0, 0, 2] = torch.tensor([9.0, 0.0]), torch.tensor([0.0, -7.0])
    mean, first, second = select.Representatives(1, 2).choose(keys)[0, 0]
    assert torch.equal(mean, keys[0, 0].mean(0))
    assert torch.equal(first, keys[0, 0, 5])
    assert torch.equal(second, keys[0, 0, 2])


def test_many_candidates_give_the_same_far_keys_as_few(monkeypatch):
    keys = tokens(2, 3, 32, 8).float()
    wanted = select.Representatives(2, 5).choose(keys)
    monkeypatch.setattr(representatives, "_MANY", 31)
    assert torch.equal(select.Representatives(2, 5).choose(keys), wanted)


def test_representatives_count_every_key_of_their_block():
    for by in (select.Representatives(4, 0), select.Representatives(1, 3), select.Representatives(2, 2)):
        assert by.total(torch.ones(1, 1, 1, by.num), 16).item() == 16


def test_the_law_of_leaves_tells_the_probability_of_what_it_draws():
    first, mass = torch.tensor([[[0, 4, 8]]]), torch.tensor([[[1.0, 3.0, 9.0]]])
    keys = Opened(torch.tensor([[[3, 9]]]), torch.tensor([[[True, True]]]))
    blocks = Closed(first, 4, mass, torch.tensor([[[False, True, False]]]))
    left = tuple(torch.tensor([[[edge]]]) for edge in (3, 10, 10, 10))
    law = leaves_of(keys, [blocks], left, num=4, uniform_share=0.25)
    index, share = law.draw((torch.arange(4) + torch.tensor([[[0.4]]])) / 4)
    assert torch.equal(law.share(index), share)
    # a key and the block of four left closed make up all there is; the opened blocks are not drawn again
    everything = law.share(torch.arange(12).expand(1, 1, 12))[0, 0]
    assert_exact(everything.sum(), torch.tensor(1.0))
    assert everything[[0, 1, 2, 8, 10, 11]].eq(0).all()
    # keys of opened blocks are listed once each, in every draw
    assert everything[[3, 9]].eq(1 / 4).all()
    assert index.flatten().tolist().count(3) == 1
    assert index.flatten().tolist().count(9) == 1


def test_opened_keys_alone_share_all_draws():
    keys = Opened(torch.tensor([[[3, 4, 5, 6]]]), torch.tensor([[[True, True, True, False]]]))
    left = tuple(torch.tensor([[[edge]]]) for edge in (3, 6, 6, 6))
    for closed in ([], [Closed(torch.tensor([[[0]]]), 4, torch.ones(1, 1, 1), torch.tensor([[[False]]]))]):
        law = leaves_of(keys, closed, left, num=2, uniform_share=0.25)
        assert_exact(law.share(torch.tensor([[[3, 4, 5, 6]]])), torch.tensor([[[1.0, 1.0, 1.0, 0.0]]]) / 3)


def test_the_coarsest_level_is_scored_only_from_the_seam_on():
    by = ha.HierarchicalSearch(LEVELS)
    tiles = cut(problem(1024), 64)
    assert by.seams(tiles, 512) == [4]
    assert ha.HierarchicalSearch((select.Level(64, 64),)).seams(tiles, 8192) == [64]
    # few draws open fewer of the last blocks, which is what the cost counts as well
    few, many = (
        ha.HierarchicalSearch((select.Level(64, 64),)).selection_pairs(4096, 64, 16, True, num) for num in (1024, 8192)
    )
    assert few > many
    assert ha.HierarchicalSearch((select.Level(64, 64),)).seams(tiles, 1024) == [8]
    short, long = (by.selection_pairs(keys, 64, 16, True, 512) for keys in (256, 2**20))
    assert short < long < 2**20 / 2


def test_what_is_computed_keeps_its_precision_however_weights_are_estimated(monkeypatch):
    q, k, v = (tokens(1, 2, 640, 16, seed=seed).float() for seed in range(3))
    method = ha.Method(ha.Sinks(4), ha.Window(64), ha.Draw(64, by=ha.HierarchicalSearch(LEVELS)))
    outs, errors = {}, []
    for dtype in (torch.bfloat16, torch.float32):
        monkeypatch.setattr(hierarchical_search, "for_estimates", lambda x, dtype=dtype: x.to(dtype))
        outs[dtype], report = with_audit(q, k, v, is_causal=True, method=method, audit=64)
        assert outs[dtype].dtype == torch.float32
        errors.append(report.relative_error.mean().item())
    assert max(errors) < 1.2 * min(errors)
    # other keys are drawn, and the rows that have no choice stay as they were
    assert not torch.equal(*outs.values())
    assert torch.equal(*(out[:, :, :128] for out in outs.values()))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: select.Representatives(0, 1), "at least one mean"),
        (lambda: select.Representatives(1, -1), "no negative number"),
        (lambda: select.Level(16, 3), "keep at least 4"),
        (lambda: select.Level(0, 8), "block_size must be a positive integer"),
        (lambda: select.Level(16, 8, select.Representatives(3)), "multiple of 3"),
        (lambda: select.Level(4, 8, select.Representatives(2, 3)), "at least 5"),
        (lambda: ha.HierarchicalSearch(()), "at least one Level"),
        (lambda: ha.HierarchicalSearch((select.Level(48, 8), select.Level(32, 8))), "use a divisor"),
        (lambda: ha.HierarchicalSearch(uniform_share=0.0), "between 0 and 1"),
        (lambda: ha.HierarchicalSearch(pooled=0), "pooled must be a positive integer"),
    ],
)
def test_bad_arguments_say_what_to_do(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("chunk", [64, 128])
def test_chunks_of_a_prompt_choose_what_one_call_does_at_every_level(chunk, seed):
    levels = select.Level(32, 4, select.Representatives(2, 2)), select.Level(16, 4), select.Level(4, 4)
    # a window smaller than a block: blocks that reach into the tile are opened, whatever is in them
    method = ha.Method(ha.Sinks(4), ha.Window(16), ha.Draw(40, by=ha.HierarchicalSearch(levels, pooled=4)), tile=64)
    q, k, v = tensors(704, batch=2, heads=4, kv_heads=2, dtype=torch.float64, seed=seed)
    options = {"is_causal": True, "enable_gqa": True, "method": method, "seed": seed, "causal_align": "lower_right"}
    whole = ha.attention(q, k, v, **options)
    for begin in range(0, 704, chunk):
        end = begin + chunk
        part = ha.attention(q[:, :, begin:end], k[:, :, :end], v[:, :, :end], **options)
        assert_exact(part, whole[:, :, begin:end])


def test_no_point_is_carried_past_the_last_candidate_with_mass():
    mass = torch.tensor([[[100.0, 156.0, 0.0]]])
    point = (torch.arange(256) + (1 - 2.0**-18)).double()[None, None] / 256
    at, _ = inverse(mass, point)
    assert at.max() == 1
