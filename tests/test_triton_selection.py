"""Selection as a GPU runs it: fused masses of blocks equal those of the CPU, and nothing makes the host wait."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import hyperattention as ha
from assertions import assert_exact, assert_same_bits
from cases import CASES
from hyperattention.problem import Problem
from hyperattention.select import DrawAlike, draw_alike
from hyperattention.select.score import hierarchical_search, leaves, search_fused, walk
from hyperattention.select.score.hierarchical_search import HierarchicalSearch
from hyperattention.select.score.level import Level
from hyperattention.select.score.mass import running_sum
from hyperattention.select.score.principal import principal_directions
from hyperattention.select.score.representatives import Representatives
from hyperattention.tiling import cut
from problems import problem, tensors

LEVELS = Level(32, 6, Representatives(2, 2)), Level(8, 4, Representatives(1, 3))
# fewer draws than keys of four blocks: none is certain; and a level above
FEW_LEVELS = Level(128, 4, Representatives(2, 2)), *LEVELS
FEW = ha.Method(ha.Sinks(4), ha.Window(16), ha.Draw(24, by=HierarchicalSearch(FEW_LEVELS, dim=12, pooled=4)), tile=16)
METHOD = ha.Method(ha.Sinks(4), ha.Window(16), ha.Draw(80, by=HierarchicalSearch(LEVELS, dim=12, pooled=4)), tile=16)


def same_basis(k: torch.Tensor, num: int, width: int, rounds: int, state: int) -> tuple[torch.Tensor, torch.Tensor]:
    head = k[:, :num].float()
    return head.mean(1, keepdim=True), principal_directions(head, width)


def chosen(problem, *, fused: bool, monkeypatch, method=METHOD) -> tuple[list, torch.Tensor, torch.Tensor]:
    """All that the walk estimates on its way, and the keys chosen by it, with their log-weights."""
    found = []

    def recorded(function):
        def record(*args):
            found.append(function(*args))
            return found[-1]

        return record

    with monkeypatch.context() as patch:
        patch.setattr(hierarchical_search, "triton_reads", lambda *tensors: fused)
        # both in one precision: estimates in bfloat16 are rounded at other places
        patch.setattr(hierarchical_search, "for_estimates", lambda x: x)
        patch.setattr(search_fused, "dtype_of_estimates", lambda device: torch.float32)
        # and in the same directions, which a kernel finds in float32
        patch.setattr(search_fused, "key_basis", same_basis)
        for name in ("_seen", "_mass"):
            patch.setattr(walk.Walk, name, recorded(getattr(walk.Walk, name)))
        for name in ("block_lse", "block_mass"):
            patch.setattr(search_fused, name, recorded(getattr(search_fused, name)))
        _, selection = method.select(problem)
    return found, selection.runs[-1].first, selection.runs[-1].log_weight


@pytest.mark.usefixtures("triton_kernel")
@pytest.mark.parametrize(
    ("num_tokens", "shape"),
    [
        pytest.param(357, {}, marks=pytest.mark.heavy),
        pytest.param(300, {"causal": False}, marks=pytest.mark.heavy),
        # the only length at which the coarsest level has more blocks than it keeps
        pytest.param(733, {"heads": 6, "kv_heads": 2, "head_dim": 16}, marks=pytest.mark.heavy),
        pytest.param(157, {"batch": 2, "heads": 3, "kv_heads": 1, "head_dim": 40}, marks=pytest.mark.slow),
        pytest.param(300, {"batch": 2, "heads": 4, "kv_heads": 2, "head_dim": 12}, marks=pytest.mark.heavy),
        pytest.param(100, {"causal": False}, marks=pytest.mark.slow),
        (100, {}),
        (63, {}),
    ],
    ids=str,
)
@pytest.mark.parametrize("method", [METHOD, FEW], ids=["many draws", "few draws"])
def test_a_fused_choice_is_that_of_the_cpu(method, num_tokens, shape, monkeypatch):
    x = problem(num_tokens, **shape)
    (ours, index, weight), (plain, expected, log_weight) = (
        chosen(x, fused=fused, monkeypatch=monkeypatch, method=method) for fused in (True, False)
    )
    assert len(ours) == len(plain)
    for a, b in zip(ours, plain, strict=True):
        # a row that knows of nothing weighs nothing; written out it is -inf minus -inf
        assert_exact(a, b.nan_to_num(nan=0.0))
    # a point may fall on the other side of an edge, by rounding
    same = index == expected
    assert same.double().mean() > 0.99
    assert torch.equal(weight == -torch.inf, log_weight == -torch.inf)
    here = same & (weight > -torch.inf)
    assert ((weight - log_weight)[here].abs() < 1e-4).all()


@pytest.mark.usefixtures("triton_kernel")
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("offset", [0, 37])
def test_what_is_prepared_is_finite_and_that_of_the_cpu(poison, offset, monkeypatch):
    monkeypatch.setattr(search_fused, "dtype_of_estimates", lambda device: torch.float32)
    q, k, v = tensors(100, heads=6, kv_heads=2, batch=2, head_dim=20)
    q[1, 2, 5, 3], k[0, 1, 60, 7] = poison, poison
    # keys as [tokens, heads, width], seen by head
    k = k.transpose(1, 2).contiguous().transpose(1, 2)
    tiles = cut(Problem(q, k, v, 0.3, causal=True, offset=offset), 24)
    flat, middle = k.flatten(0, 1), torch.randn(4, 1, 20, generator=torch.Generator().manual_seed(0))
    for basis in (None, torch.randn(4, 20, 7, generator=torch.Generator().manual_seed(1))):
        given = tiles, flat, middle, basis, 128, 5
        for a, b in zip(search_fused.prepared_with(*given), hierarchical_search._prepare(*given), strict=True):
            assert torch.isfinite(a).all()
            assert_exact(a, b, size=30.0)


class Spy(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.calls[func.overloadpacket._qualified_op_name] += 1
        devices = {x.device.type for x in tree_leaves((args, kwargs, result)) if isinstance(x, torch.Tensor)}
        self.calls["a copy between devices"] += len(devices) > 1
        return result


# operators whose result, or its shape, the host must wait for, and solvers that report to it
WAITS = {
    "aten::_local_scalar_dense", "aten::item", "aten::nonzero", "aten::masked_select", "aten::unique_consecutive",
    "aten::_unique2", "aten::equal", "aten::is_nonzero", "aten::_linalg_eigh", "aten::linalg_qr", "aten::_linalg_svd",
    "a copy between devices",
}  # fmt: skip


def waits(spy: Spy) -> set[str]:
    return {name for name in WAITS if spy.calls[name]}


def has_kernels(method: ha.Method) -> bool:
    """Whether any of its stages chooses keys by kernels: a search that descends, or draws for alike queries."""
    if any(isinstance(stage, DrawAlike) for stage in method.stages):
        return True
    draws = [stage for stage in method.stages if isinstance(stage, ha.Draw)]
    return any(isinstance(density, HierarchicalSearch) for draw in draws for density, _ in draw.by.components)


LISTED = [(case, fused) for case in CASES if isinstance(case.method, ha.Method) for fused in (False, True)]


@pytest.mark.parametrize(
    ("method", "fused"),
    [
        pytest.param(case.method, fused, id=f"{case.name}, {'fused' if fused else 'in torch'}")
        for case, fused in LISTED
        if not fused or has_kernels(case.method)
    ],
)
def test_selection_never_makes_the_host_wait(method, fused, monkeypatch):
    """On the meta device nothing can be waited for: what needs a value fails, and CPU tensors among the others do too."""
    for module in (hierarchical_search, draw_alike):
        monkeypatch.setattr(module, "triton_reads", lambda *tensors: fused)
    q, k, v = (x.to("meta") for x in tensors(9000, heads=4, kv_heads=2, head_dim=128))
    x = Problem(q, k, v, 0.1, causal=True)
    with Spy() as spy:
        selected = method.selections(x)
    assert not waits(spy)
    assert all(run.first.device.type == "meta" for _, selection in selected for run in selection.runs)


@pytest.mark.parametrize(
    "cause", [lambda x: bool(x.sum() > 2), lambda x: torch.linalg.eigh(x @ x.T), lambda x: x.to("meta")]
)
def test_the_spy_sees_a_wait(cause):
    with Spy() as spy:
        cause(torch.ones(3, 3))
    assert waits(spy)


def test_running_sums_are_in_fixed_point_where_no_order_is_promised():
    dtypes = []

    class Summed(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.cumsum.default:
                dtypes.append(args[0].dtype)
            return func(*args, **(kwargs or {}))

    with Summed():
        for device in ("meta", "cpu"):
            running_sum(torch.ones(3, 5, device=device))
    assert dtypes == [torch.int64, torch.float32]


def law_of(law: search_fused.FusedLeaves, point: torch.Tensor) -> torch.Tensor:
    return law.draw(point)[0]


MASSES = {
    "even": lambda x: x,
    "one far above a draw's share": lambda x: x.index_fill(2, torch.tensor([3]), 1e6),
    "not finite": lambda x: x.index_fill(2, torch.tensor([3]), torch.nan).index_fill(2, torch.tensor([5]), torch.inf),
    "nothing": lambda x: x * 0,
}


@pytest.mark.usefixtures("triton_kernel")
@pytest.mark.parametrize("mass", MASSES.values(), ids=MASSES)
@pytest.mark.parametrize("opened", [0, 8, 40])
def test_fused_draws_are_those_of_the_law(mass, opened):
    generator = torch.Generator().manual_seed(opened)
    shape, num = (2, 3, 30), 24
    first = torch.arange(opened).expand(2, 3, -1)
    # earlier stages took the first keys
    keys = leaves.Opened(first, first >= 3)
    blocks = leaves.Closed(
        opened + 16 * torch.arange(30).expand(shape),
        16,
        mass(torch.rand(shape, generator=generator)),
        torch.rand(shape, generator=generator) < 0.8,
    )
    count = keys.alive.sum(2, keepdim=True) + 16 * blocks.alive.sum(2, keepdim=True)
    begin, end = torch.full_like(count, 3), 3 + count
    left = begin, end, end, end
    noise = torch.rand(2, 3, 1, generator=generator).double()
    point = (torch.arange(num) + noise) / num
    law = leaves.leaves_of(keys, [blocks], left, num, 0.2)
    found = search_fused._Blocks(blocks.first, 30, 16, blocks.mass, blocks.alive.to(torch.uint8))
    edges = torch.cat([*left, end], 2)
    ours = search_fused.FusedLeaves(search_fused._Blocks(None, opened, 1), (found,), edges, num, 0.2)
    (index, share), (expected, probability) = (law.draw(point) for law in (ours, law))
    same = index == expected
    assert same.double().mean() > 0.97
    assert_exact(share[same], probability[same])
    # a mixture asks for the probabilities of other keys as well
    key = torch.arange(opened + 480).expand(2, 3, -1)
    assert_exact(ours.share(key), law.share(key))
    # the same draws with their log-weights, in some lists of many tiles
    index, weight = index.new_empty(2, 5, num)[:, 1:4], share.new_empty(2, 5, num)[:, 1:4]
    ours.write(noise[..., 0], (index, weight))
    few = (count <= num).expand_as(index)
    assert_same_bits(few.any(), (count <= num).any())
    assert_same_bits(index[~few], law_of(ours, point)[~few])
    expected = (-(share * num).log()).masked_fill(share == 0, -torch.inf)
    assert_exact(weight[~few], expected[~few], size=10.0)


@pytest.mark.heavy
def test_operators_of_a_choice_are_registered_soundly(triton_kernel, monkeypatch):
    captured = {}

    class Capture(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "hyperattention":
                captured[func] = args
            return func(*args, **(kwargs or {}))

    with Capture():
        chosen(problem(300, heads=2, kv_heads=1, head_dim=16), fused=True, monkeypatch=monkeypatch)
    # all but the places and the directions, for which PyTorch stands in
    assert len(captured) == 8
    for operator, args in captured.items():
        # poisoned memory would not be what the operator's fake promises
        torch.library.opcheck(operator, args, test_utils=("test_schema", "test_faketensor"))


def test_principal_directions_carry_what_the_best_do():
    keys = torch.randn(3, 200, 40, generator=torch.Generator().manual_seed(0)) * torch.linspace(3, 0.1, 40) + 5.0
    found = principal_directions(keys, 12)
    assert_exact(found.transpose(1, 2) @ found, torch.eye(12).expand(3, -1, -1))
    centred = keys - keys.mean(1, keepdim=True)
    best = torch.linalg.svdvals(centred)[:, :12].square().sum(1)
    assert ((centred @ found).square().sum((1, 2)) >= 0.97 * best).all()


def test_fewer_keys_than_directions_still_span_orthonormal_ones():
    keys = torch.randn(1, 4, 12, generator=torch.Generator().manual_seed(0))
    found = principal_directions(keys, 8)
    centred = keys - keys.mean(1, keepdim=True)
    # all that there is, lies in what was found
    assert_exact(centred @ found @ found.transpose(1, 2), centred)


@pytest.mark.parametrize("keys", [torch.zeros(1, 9, 8), torch.ones(1, 1, 8) * 1e20, torch.full((1, 9, 8), torch.nan)])
def test_principal_directions_of_next_to_nothing_are_finite(keys):
    assert torch.isfinite(principal_directions(keys, 4)).all()


def test_running_sums_in_fixed_point_are_running_sums():
    mass = torch.rand(3, 50, 900, generator=torch.Generator().manual_seed(0)) ** 8
    mass[0, 0], mass[1, 1, 5:] = 0.0, 0.0
    ours, plain = running_sum(mass, fixed=True), mass.double().cumsum(-1)
    assert ((ours - plain).abs() <= 1e-6 * plain[..., -1:]).all()
    assert (ours.diff(dim=-1) >= 0).all()
    assert running_sum(mass, fixed=True).dtype == mass.dtype
