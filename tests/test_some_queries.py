"""Some heads, or some spans of queries: they must read the very keys that they would have read among all others."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import hyperattention as ha
from assertions import assert_exact, assert_same_bits
from cases import CASES, CONTROL
from front_door import with_error, with_lse
from hyperattention.methods.method import Method
from problems import problem, tensors

SPANS = [case for case in CASES if isinstance(case.method, Method) and case.method.looks_ahead < ha.LookAhead.SEQUENCE]


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("case", SPANS, ids=lambda case: case.name)
def test_spans_of_queries_attend_as_they_do_among_all(case, causal):
    tile = case.method.tile
    whole = problem(max(case.num_tokens, 6 * tile + 5), causal=causal, heads=4)
    first, length, step = tile, tile, 2 * tile
    few = whole.of_spans(first, length, step)
    rows = few.position
    count = (whole.num_queries - first - length) // step + 1
    assert rows.tolist() == [first + span * step + row for span in range(count) for row in range(length)]
    ours, all_rows = case.method.attend(few), case.method.attend(whole)
    # a product of another shape may round the estimates otherwise
    assert_exact(ours.lse, all_rows.lse[:, :, rows])
    assert_exact(ours.out, all_rows.out[:, :, rows])


def test_exact_attention_of_spans():
    whole = problem(100, causal=True)
    few = whole.of_spans(16, 16, 32)
    assert_exact(ha.Exact().output(few), ha.Exact().output(whole)[:, :, few.position])


def test_spans_that_do_not_fit_are_refused():
    whole = problem(100)
    with pytest.raises(ValueError, match="no complete span of 60 queries"):
        whole.of_spans(50, 60, 60)
    with pytest.raises(ValueError, match="not complete tiles of 16"):
        CONTROL.attend(whole.of_spans(0, 10, 20))
    with pytest.raises(ValueError, match="was given some of them"):
        ha.HyperAttention().attend(whole.of_spans(0, 16, 32))


@pytest.mark.parametrize("heads", [[1, 2], [3, 0], [2]], ids=str)
def test_heads_alone_draw_what_they_draw_among_all(heads):
    whole = problem(150, heads=8, kv_heads=4)
    ours, all_heads = CONTROL.attend(whole.of_heads(heads)), CONTROL.attend(whole)
    assert_same_bits(ours.out, all_heads.out.unflatten(1, (4, 2))[:, heads].flatten(1, 2))
    again = whole.of_heads([3, 1, 0]).of_heads([1, 2])
    assert again.heads == (1, 0)


class NoIndex(TorchDispatchMode):
    """Refuses an index, which a list of numbers becomes on its way to the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten.index.Tensor
        return func(*args, **(kwargs or {}))


def test_numbers_of_heads_are_not_copied_from_the_host(monkeypatch):
    """A GPU would make the host wait for such a copy, and no graph captures it."""

    def refuse(*args, **kwargs):
        raise AssertionError("numbers of the host become a tensor")

    whole, method = problem(150, heads=8, kv_heads=4), ha.ByHead((CONTROL, ha.Exact(), CONTROL, ha.Exact()))
    with monkeypatch.context() as patch, NoIndex():
        patch.setattr(torch, "tensor", refuse)
        few, numbers = whole.of_heads([3, 0]), whole.of_heads([3, 0, 1]).head_index
        joined = method._in_order([part.q for _, part in method._parts(whole)])
    assert numbers.tolist() == [3, 0, 1]
    assert torch.equal(few.q, whole.q[:, [6, 7, 0, 1]])
    assert torch.equal(joined, whole.q)


def test_every_head_gets_its_own_method():
    q, k, v = tensors(150, heads=8, kv_heads=4)
    options = {"is_causal": True, "enable_gqa": True}
    mixed = with_lse(q, k, v, method=ha.ByHead((CONTROL, ha.Exact(), CONTROL, ha.Exact())), **options)
    drawn, exact = (with_lse(q, k, v, method=method, **options) for method in (CONTROL, ha.Exact()))
    for ours, by_control, by_exact in zip(mixed, drawn, exact, strict=True):
        ours, by_control, by_exact = (x.unflatten(1, (4, 2)) for x in (ours, by_control, by_exact))
        assert_same_bits(ours[:, ::2], by_control[:, ::2])
        assert_exact(ours[:, 1::2], by_exact[:, 1::2])
        assert not torch.equal(by_control, by_exact)


def test_by_head_costs_the_mean_of_its_methods():
    method = ha.ByHead((CONTROL, ha.Exact()))
    parts = [each.cost(1000) for each in method.methods]
    assert method.cost(1000).pairs == sum(part.pairs for part in parts) / 2
    assert method.complete
    assert not ha.ByHead((CONTROL, Method(ha.Window(16)))).complete


def test_a_wrong_number_of_methods_is_refused():
    q, k, v = tensors(50, heads=2, kv_heads=2)
    with pytest.raises(ValueError, match="3 methods and the keys have 2 heads"):
        ha.attention(q, k, v, method=ha.ByHead((CONTROL,) * 3))
    with pytest.raises(ValueError, match="give one method for each kv head"):
        ha.ByHead(())
    with pytest.raises(TypeError, match="not ByHead"):
        ha.ByHead((ha.ByHead((CONTROL,)),))


def test_standard_errors_by_head():
    q, k, v = tensors(150, heads=4, kv_heads=2)
    options = {"is_causal": True, "enable_gqa": True}
    mixed = with_error(q, k, v, method=ha.ByHead((ha.Exact(), CONTROL)), **options)[1]
    alone = with_error(q, k, v, method=CONTROL, **options)[1]
    assert_same_bits(mixed[:, 2:], alone[:, 2:])
    assert_same_bits(mixed[:, :2], torch.zeros_like(mixed[:, :2]))
