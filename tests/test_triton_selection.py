"""Selection as a GPU runs it: fused masses of blocks equal those of the CPU, and nothing makes the host wait."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import hyperattention as ha
from assertions import assert_exact
from cases import CASES
from hyperattention.problem import Problem
from hyperattention.select.score import descent, walk
from hyperattention.select.score.descent import Descent
from hyperattention.select.score.level import Level
from hyperattention.select.score.mass import running_sum
from hyperattention.select.score.principal import principal_directions
from hyperattention.select.score.representatives import Representatives
from hyperattention.tiling import cut
from problems import problem, tensors

LEVELS = Level(32, 6, Representatives(2, 2)), Level(8, 4, Representatives(1, 3))
# fewer draws than keys of four blocks: none is certain; and a level above
FEW_LEVELS = Level(128, 4, Representatives(2, 2)), *LEVELS
FEW = ha.Method(ha.Sinks(4), ha.Window(16), ha.Draw(24, by=Descent(FEW_LEVELS, dim=12, pooled=4)), tile=16)
METHOD = ha.Method(ha.Sinks(4), ha.Window(16), ha.Draw(80, by=Descent(LEVELS, dim=12, pooled=4)), tile=16)


def chosen(problem, *, fused: bool, monkeypatch, method=METHOD) -> tuple[list, torch.Tensor, torch.Tensor]:
    """All that the walk estimates on its way, and the keys chosen by it, with their log-weights."""
    found = []

    def recorded(function):
        def record(*args):
            found.append(function(*args))
            return found[-1]

        return record

    with monkeypatch.context() as patch:
        for module in (descent, walk):
            patch.setattr(module, "triton_reads", lambda *tensors: fused)
        # both in one precision: estimates in bfloat16 are rounded at other places
        patch.setattr(descent, "for_estimates", lambda x: x)
        for name in ("_seen", "_mass"):
            patch.setattr(walk.Walk, name, recorded(getattr(walk.Walk, name)))
        _, selection = method.select(problem)
    return found, selection.runs[-1].first, selection.runs[-1].log_weight


@pytest.mark.usefixtures("triton_kernel")
@pytest.mark.parametrize(
    ("num_tokens", "shape"),
    [
        (600, {}),
        (600, {"causal": False}),
        (733, {"heads": 6, "kv_heads": 2, "head_dim": 16}),
        (257, {"batch": 2, "heads": 3, "kv_heads": 1, "head_dim": 40}),
        (300, {"batch": 2, "heads": 4, "kv_heads": 2, "head_dim": 12}),
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
    monkeypatch.setattr(descent, "for_estimates", lambda x: x)
    q, k, v = tensors(100, heads=6, kv_heads=2, batch=2, head_dim=20)
    q[1, 2, 5, 3], k[0, 1, 60, 7] = poison, poison
    # keys as [tokens, heads, width], seen by head
    k = k.transpose(1, 2).contiguous().transpose(1, 2)
    tiles = cut(Problem(q, k, v, 0.3, causal=True, offset=offset), 24)
    flat, middle = k.flatten(0, 1), torch.randn(4, 1, 20, generator=torch.Generator().manual_seed(0))
    for basis in (None, torch.randn(4, 20, 7, generator=torch.Generator().manual_seed(1))):
        given = tiles, flat, middle, basis, 128, 5
        for a, b in zip(descent._prepare_on_a_gpu(*given), descent._prepare(*given), strict=True):
            assert torch.isfinite(a).all()
            assert_exact(a, b, size=30.0)


class Spy(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[func.overloadpacket._qualified_op_name] += 1
        return func(*args, **(kwargs or {}))


# operators whose result, or its shape, the host must wait for, solvers that report to it, and copies between devices
WAITS = {
    "aten::_local_scalar_dense", "aten::item", "aten::nonzero", "aten::masked_select", "aten::unique_consecutive",
    "aten::_unique2", "aten::equal", "aten::is_nonzero", "aten::_linalg_eigh", "aten::linalg_qr", "aten::_linalg_svd",
    "aten::lift_fresh", "aten::_to_copy.device",
}  # fmt: skip


@pytest.mark.parametrize("method", [c.method for c in CASES if isinstance(c.method, ha.Method)], ids=repr)
def test_selection_never_makes_the_host_wait(method):
    """On the meta device nothing can be waited for: what needs a value fails, and CPU tensors among the others do too."""
    q, k, v = (x.to("meta") for x in tensors(3000, heads=4, kv_heads=2, head_dim=128))
    x = problem(1)
    x = type(x)(q, k, v, 0.1, causal=True)
    with Spy() as spy:
        selected = method.selections(x)
    assert not WAITS & set(spy.calls), WAITS & set(spy.calls)
    assert all(run.first.device.type == "meta" for _, selection in selected for run in selection.runs)


def test_the_spy_sees_a_wait():
    with Spy() as spy:
        bool(torch.ones(3).sum() > 2)
    assert WAITS & set(spy.calls)


def test_principal_directions_carry_what_the_best_do():
    keys = torch.randn(3, 200, 40, generator=torch.Generator().manual_seed(0)) * torch.linspace(3, 0.1, 40) + 5.0
    found = principal_directions(keys, 12)
    assert_exact(found.transpose(1, 2) @ found, torch.eye(12).expand(3, -1, -1))
    centred = keys - keys.mean(1, keepdim=True)
    best = torch.linalg.svdvals(centred)[:, :12].square().sum(1)
    assert ((centred @ found).square().sum((1, 2)) >= 0.97 * best).all()


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
