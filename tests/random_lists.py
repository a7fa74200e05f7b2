"""Random lists for the kernel, with every kind of slot it must know, and the triple loop that defines what it computes."""

from dataclasses import replace

import torch
from torch import Tensor

from hyperattention.types import Runs, Selection

LISTS, TILES, ROWS, KEYS, WIDTH, VALUE_WIDTH = 2, 3, 4, 12, 3, 2
SCALE = 0.7
LOG_2 = torch.tensor(2.0).log().item()


def integers(generator: torch.Generator, low: int, high: int, *shape: int) -> Tensor:
    return torch.randint(low, high, shape, generator=generator)


def make_runs(generator: torch.Generator, size: int, slots: int, keys: int = KEYS, **options) -> Runs:
    low = integers(generator, 0, min(3, keys), LISTS, TILES)
    weight = torch.rand((LISTS, TILES, slots), generator=generator) - 0.3
    weight = weight.masked_fill(torch.rand(weight.shape, generator=generator) < 0.2, -torch.inf)
    # runs overhang both ends of the keys
    first = integers(generator, -1, keys + 1, LISTS, TILES, slots)
    high = low + integers(generator, 4, max(5, keys - 3), LISTS, TILES)
    low, high = low.clamp(max=keys), high.clamp(max=keys)
    # the rows of the last tile see nothing
    high[-1, -1] = low[-1, -1]
    return Runs(first, size, weight, low, high, **options)


def make_selection(
    *, tests: bool = True, seed: int = 0, keys: int = KEYS, slots: tuple[int, int, int, int] = (5, 2, 2, 2), rows: int = ROWS
) -> Selection:
    """Drawn keys, blocks with holes, causal runs and labelled ones, gaps; all random."""
    generator = torch.Generator().manual_seed(seed)
    hole = integers(generator, 3, 6, LISTS, TILES)
    kinds = (1, {}), (3, {"hole": (hole, hole + 2)}), (4, {"causal": True}), (2, {"labelled": True})
    runs = tuple(make_runs(generator, size, num, keys, **kind) for (size, kind), num in zip(kinds, slots, strict=True))
    if not tests:
        runs = tuple(replace(run, causal=False, labelled=False) for run in runs)
    gap = integers(generator, 0, keys, LISTS, TILES, rows)
    return Selection(
        runs,
        row_limit=integers(generator, 0, keys + 1, LISTS, TILES, rows),
        # both lists read the second row of keys first: lists need not stand in the order of the keys
        key_row=torch.tensor([1, 0]),
        row_label=integers(generator, 0, 3, LISTS, TILES, rows),
        key_label=integers(generator, 0, 3, LISTS, keys),
        row_gap=(gap, gap + min(2, keys // 2)) if tests else None,
    )


def make_tensors(
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    keys: int = KEYS,
    rows: int = ROWS,
    widths: tuple[int, int] = (WIDTH, VALUE_WIDTH),
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = (LISTS, TILES, rows, widths[0]), (LISTS, keys, widths[0]), (LISTS, keys, widths[1])
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)


def expand(run: Runs) -> Runs:
    """The same keys as runs of one, without bounds."""
    first = (run.first[..., None] + torch.arange(run.size)).flatten(2)
    live = (first >= run.low[..., None]) & (first < run.high[..., None])
    if run.hole is not None:
        live &= (first < run.hole[0][..., None]) | (first >= run.hole[1][..., None])
    weight = run.log_weight.repeat_interleave(run.size, 2).masked_fill(~live, -torch.inf)
    low = torch.zeros_like(run.low)
    return Runs(first, 1, weight, low, low + KEYS)


def counts(selection: Selection, run: Runs, at: tuple[int, int, int], key: int) -> bool:
    """Whether a row may use a key that a run lists."""
    lst, tile, _row = at
    if not run.low[lst, tile] <= key < run.high[lst, tile]:
        return False
    if run.hole is not None and run.hole[0][lst, tile] <= key < run.hole[1][lst, tile]:
        return False
    if run.causal and key >= selection.row_limit[at]:
        return False
    if selection.row_gap is not None and selection.row_gap[0][at] <= key < selection.row_gap[1][at]:
        return False
    return not (run.labelled and selection.row_label[at] == selection.key_label[lst, key])


def triple_loop(q: Tensor, k: Tensor, v: Tensor, selection: Selection, scale: float) -> tuple[Tensor, Tensor]:
    """The definition: tile by tile, row by row, slot by slot."""
    outs, lses = [], []
    for at in [(lst, tile, row) for lst in range(q.shape[0]) for tile in range(q.shape[1]) for row in range(q.shape[2])]:
        source, scores, values = selection.key_row[at[0]], [], []
        for run in selection.runs:
            for first, weight in zip(run.first[at[:2]].tolist(), run.log_weight[at[:2]], strict=True):
                for key in range(first, first + run.size):
                    if weight > -torch.inf and counts(selection, run, at, key):
                        scores.append(q[at] @ k[source, key] * scale + weight.to(q.dtype))
                        values.append(v[source, key])
        if scores:
            score = torch.stack(scores)
            outs.append(score.softmax(0) @ torch.stack(values))
            lses.append(score.logsumexp(0))
        else:
            outs.append(q.new_zeros(v.shape[-1]))
            lses.append(q.new_full((), -torch.inf))
    return torch.stack(outs).view(*q.shape[:3], -1), torch.stack(lses).view(q.shape[:3])


def loss(out: Tensor, lse: Tensor) -> Tensor:
    """Weigh every number differently; rows that see nothing have no lse to weigh."""
    ramp = torch.linspace(0.5, 2, out.numel()).view(out.shape).to(out)
    return (out * ramp).sum() + (lse.masked_fill(lse == -torch.inf, 0.0) * ramp[..., 0]).sum()


def gradients(attend, tensors: tuple[Tensor, ...], selection: Selection) -> tuple[Tensor, ...]:
    tensors = tuple(x.detach().requires_grad_() for x in tensors)
    return torch.autograd.grad(loss(*attend(*tensors, selection, SCALE)), tensors)
