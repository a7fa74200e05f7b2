"""What a method says it will spend, before it runs, is what its lists hold; near-linearity is counted, not timed."""

import itertools
from dataclasses import dataclass, field

import pytest
from torch import Tensor

import hyperattention as ha
from cases import CASES, CONTROL, Case
from hyperattention import rivals, select
from hyperattention.methods.method import Method
from hyperattention.select.score.blocks import BlockRank
from problems import problem

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def listed(method: Method, num_tokens: int, causal: bool) -> int:
    """Slots listed for every query, masked ones included: those of its tile, in each tiling."""
    selected = method.selections(problem(num_tokens, causal=causal))
    return sum(run.first.shape[2] * run.size for _, selection in selected for run in selection.runs)


@every_case
@pytest.mark.parametrize("causal", [True, False])
def test_pairs_are_what_the_selection_lists(case, causal):
    if not isinstance(case.method, Method):
        pytest.skip("it is no list of stages: there is no selection to count")
    cost = case.method.cost(case.num_tokens, is_causal=causal)
    # buckets are equal to within a key, so a tile of a bucket may hold a row or two of padding
    slack = 0.1 if any(isinstance(stage, ha.HashBuckets) for stage in case.method.stages) else 0.0
    assert cost.pairs == pytest.approx(listed(case.method, case.num_tokens, causal), rel=slack, abs=0)
    assert cost.complete == case.method.complete


@every_case
def test_pairs_do_not_grow_once_the_budget_is_full(case: Case):
    if isinstance(case.method, ha.Exact):
        pytest.skip("exact attention is quadratic")
    costs = [case.method.cost(n) for n in (2**12, 2**14, 2**16)]
    per_doubling = [(b.pairs - a.pairs) / 2 for a, b in itertools.pairwise(costs)]
    # none for lists; a recursion adds the same again with every doubling
    # differences of numbers of thousands, in double precision
    assert per_doubling[0] == pytest.approx(per_doubling[1], abs=1e-6)
    assert per_doubling[0] == 0 or not isinstance(case.method, Method)
    assert costs[0].pairs < 2**12 / 2


def test_exact_attention_costs_every_visible_key():
    assert ha.Exact().cost(1000).pairs == 500.5
    assert ha.Exact().cost(1000, is_causal=False).pairs == 1000
    assert ha.Exact().cost(1000).share_of_exact == 1
    assert ha.Exact().cost(0).share_of_exact == 1
    assert CONTROL.cost(1000).exact_pairs == 500.5
    assert CONTROL.cost(1000).share_of_exact == (4 + 16 + 16 + 16) / 500.5


def test_what_draws_and_ranges_cost_to_choose():
    assert CONTROL.cost(10**6).selection_pairs == 0


@dataclass(frozen=True)
class Counting(BlockRank):
    """A rank that counts the numbers it multiplies."""

    by: BlockRank
    numbers: list[int] = field(default_factory=list)

    def basis(self, k: Tensor) -> Tensor | None:
        return self.by.basis(k)

    def summarise(self, k: Tensor, block_size: int, per_panel: int) -> tuple[Tensor, ...]:
        return self.by.summarise(k, block_size, per_panel)

    def score(self, query: Tensor, summary: tuple[Tensor, ...]) -> Tensor:
        self.numbers.append(query.shape[0] * query.shape[1] * sum(x[0].numel() for x in summary))
        return self.by.score(query, summary)

    def width(self, head_dim: int) -> int:
        return self.by.width(head_dim)

    def products(self, block_size: int) -> int:
        return self.by.products(block_size)


@pytest.mark.parametrize("by", [select.MeanKey(), select.KeyBounds(), select.KeySketch(4)], ids=repr)
def test_selection_pairs_are_what_ranking_multiplies(by):
    counted = Counting(by)
    method = ha.Method(ha.Window(16), ha.TopBlocks(2, block_size=8, by=counted), tile=16)
    asked = problem(160, causal=False)
    method.select(asked)
    heads, (num_tokens, head_dim) = asked.q.shape[1], asked.q.shape[2:]
    assert (
        method.cost(160, is_causal=False, head_dim=head_dim).selection_pairs
        == sum(counted.numbers) / heads / num_tokens / head_dim
    )


def test_selection_pairs_of_the_default_stay_small():
    cost = ha.default_method(131_072).cost(131_072)
    assert cost.selection_pairs <= 0.1 * cost.exact_pairs
    # reported apart: pairs of the kernel do not hold them
    assert cost.pairs == ha.default_method(131_072).cost(10**6).pairs


def test_memory_is_that_of_the_tensors_it_names():
    method, n, d = ha.Method(ha.Window(64), tile=64), 640, 32
    # 10 tiles gather 128 keys and values each; queries are read and rows written
    assert method.cost(n, head_dim=d).memory_bytes == 4 * (10 * 2 * 128 * d + 2 * n * d)


def test_a_method_prints_as_the_code_that_makes_it():
    for case in CASES:
        names = vars(ha) | vars(select) | vars(rivals) | {"Exact": ha.Exact}
        assert eval(repr(case.method), names) == case.method
