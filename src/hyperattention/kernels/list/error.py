"""The variance of a list's output, estimated from its drawn slots: a second pass over them, in PyTorch on any device."""

from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad

from hyperattention.kernels.list.operator import fields
from hyperattention.kernels.list.reference import Lists, Workspace, as_rows, chunks, gather, masked_scores, tiles_at_once
from hyperattention.types import Runs, Selection

# smallest share that the other slots of a row are assumed to have: below it, rounding errors are larger than the estimate
_LEAST_REST = 0.01


def error_variance(
    rows: tuple[Tensor, Tensor, Tensor],
    k: Float[Tensor, "*key_rows keys head_dim"],
    v: Float[Tensor, "*key_rows keys value_dim"],
    selection: Selection,
    scale: float,
    table: Int[Tensor, "sequences pages"] | None = None,
) -> Float[Tensor, "lists tiles rows"]:
    """Estimate E ||out_i - E out_i||^2 over the draws, by differences between the contributions of neighbouring slots.

    The contribution of slot s is the change of the output without this slot: with p_is its share of the row's sum,

        t_is = out_i - out_i without s = p_is / (1 - p_is) (v_s - out_i),   p_is = w_s exp(q_i . k_s * scale - lse_i)

    where out and lse are over the keys of every stage. Slots of a sample are in the order of its strata, one draw in each,
    so that neighbours differ like two draws of one stratum. For m draws with the same f

        variance_i ~ m / (m - 1) * f / 2 * sum_s ||t_is - t_i,s+1||^2,   and the variances of several samples add up

    f is the share of the variance that remains if strata hold few keys: 1 for many keys, 0 for a key that is listed for all
    points (see `_randomness`). If f differs within a pair, the pair counts with the smaller f, so that a certain key is
    never compared with a drawn one, and m / (m - 1) becomes the sum of f over the sum of f of pairs. A draw without a pair
    counts with f ||t||^2, which is too large.

    Source: Wolter, 2007, Introduction to Variance Estimation, estimator v2 of systematic samples; the jackknife, Tukey,
    1958, for the t of a ratio.   Differs: f for each slot, in place of one for the population. The delta method, without 1 -
    p, underestimates the variance by a fifth to two thirds if single draws hold much of a row's weight.
    Cost: the forward pass's two products over the drawn slots, whose keys and values are gathered again.
    Guarantee: unbiased to first order for keys in random order. The estimate is too large if the means of strata differ, and
    too small if keys repeat with the period of evenly spaced points. It does not include heavy keys that were not drawn.

    Args:
        rows: queries by tile, ``[lists, tiles, rows, head_dim]``, their final outputs, merged over all tilings,
            ``[lists, tiles, rows, value_dim]``, and their final lse, ``[lists, tiles, rows, 1]``.
        k: keys, as for `list_attention`.
        v: values.
        selection: the lists.
        scale: factor of the scores.
        table: pages of each sequence, if keys lie in pages.

    Returns:
        variances, in the dtype of lse; 0 if no slot was drawn.
    """
    runs = tuple(run for run in selection.runs if run.sample is not None)
    q, out, lse = (x.flatten(0, 1) for x in rows)
    (tiles, size, head_dim), value_dim, slots = q.shape, v.shape[-1], sum(run.first.shape[2] for run in runs)
    variance = lse.new_zeros(tiles, size)
    k_rows, v_rows = as_rows(k, table), as_rows(v, table)
    num_keys = k.shape[1] if table is None else table.shape[1] * k.shape[2]
    if num_keys and q.numel() and slots:
        # a second buffer of the size of the scores
        step = tiles_at_once(slots, 2 * size, head_dim + value_dim, tiles)
        work = Workspace.make(step, size, slots, (head_dim, value_dim), lse)
        spare = torch.empty_like(work.scores)
        lists = Lists(*fields(replace(selection, runs=runs)))
        for chunk in chunks(lists, num_keys, step, lse.dtype):
            keys = gather(k_rows, chunk.key_index, work.keys, table)
            scores = masked_scores(q[chunk.tiles].to(lse.dtype) * scale, keys, chunk, work.scores)
            odds = _odds(scores, lse[chunk.tiles], spare[: len(scores)])
            values = gather(v_rows, chunk.key_index, work.values, table)
            own, pair = _coefficients(runs, chunk.tiles, lse.dtype)
            mean = out[chunk.tiles].to(lse.dtype)
            variance[chunk.tiles] = _quadratic_form(odds, values, mean, own, pair, spare[: len(odds)])
    return variance.view(selection.row_limit.shape)


def _odds(scores: Tensor, lse: Tensor, spare: Tensor) -> Tensor:
    """Turn scores ``[chunk, rows, slots]`` into odds p / (1 - p), in place; lse is ``[chunk, rows, 1]``."""
    top = scores.amax(-1, keepdim=True)
    # softmax, then the share of these slots in the row: a quarter of the time of exp
    share = torch.softmax(scores, -1, out=scores)
    share.mul_((top - share.amax(-1, keepdim=True).log() - lse).exp_())
    odds, empty = share.div_(torch.sub(1.0, share, out=spare).clamp_(min=_LEAST_REST)), top == -torch.inf
    # checking first saves time on a CPU, where the check needs no synchronisation
    return odds.masked_fill_(empty, 0.0) if odds.device.type != "cpu" or empty.any() else odds


def _coefficients(runs: tuple[Runs, ...], part: slice, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the coefficients of every slot, and of every slot with its successor: ``[chunk, 1, slots]`` each."""
    own, pairs = [], []
    for run in runs:
        assert run.sample is not None
        weight = run.log_weight.flatten(0, 1)[part].to(dtype)
        listings = (-weight).exp() if run.sample.listings is None else run.sample.listings.flatten(0, 1)[part].to(dtype)
        at = 0
        for size, evenly in zip(run.sample.sizes, run.sample.evenly, strict=True):
            f = _randomness(listings[:, at : at + size], evenly).masked_fill_(weight[:, at : at + size] == 0, 0.0)
            pair = torch.minimum(f[:, :-1], f[:, 1:])
            total = pair.sum(-1, keepdim=True)
            # halves, because each of two draws varies
            pair = pad(0.5 * pair * (f.sum(-1, keepdim=True) / total.masked_fill(total == 0, 1.0)), (0, 1))
            own.append(torch.where(total == 0, f, pair + pad(pair[:, :-1], (1, 0))))
            pairs.append(pair)
            at += size
    return torch.cat(own, 1)[:, None], torch.cat(pairs, 1)[:, None]


def _randomness(listings: Tensor, evenly: bool) -> Tensor:
    """Return the share of the neighbours' variance that a draw has, by the expected listings e of its key.

    A key covers a length of e strata. Evenly spaced points list it once with probability e, otherwise not at all: the share
    1 - e remains, as in every sample without replacement. Points drawn one by one in their strata may list a key that lies
    in two strata twice: for keys in random order the share (1 - e + e^2 / 3) remains in a stratum, and neighbours differ
    with probability 1 - e^2 / 6.

    Args:
        listings: expected number of listings of each slot's key; infinite for an empty slot.
        evenly: whether points are evenly spaced.

    Returns:
        numbers from 0 to 1.
    """
    # an empty slot: its key is unknown and counts as one of many
    e = listings.masked_fill(listings == torch.inf, 0.0)
    if evenly:
        # a key listed once or twice: twice with probability e - 1
        return torch.where(e < 1, 1 - e, (e - 1).clamp(max=0.25))
    e = e.clamp(max=1.0)
    return (1 - e + e.square() / 3) / (1 - e.square() / 6)


def _quadratic_form(odds: Tensor, values: Tensor, mean: Tensor, own: Tensor, pair: Tensor, spare: Tensor) -> Tensor:
    """Compute sum_s own_s ||t_s||^2 - 2 pair_s t_s . t_{s+1} for t_s = o_s (v_s - mean), without computing t.

    With M the matrix that has `own` on its diagonal and -`pair` beside it, and h_s = o_s (M o)_s, the sum is

        sum_sr M_sr o_s o_r v_s . v_r  -  2 mean . sum_s h_s v_s  +  ||mean||^2 sum_s h_s

    Args:
        odds: the o, ``[chunk, rows, slots]``; overwritten.
        values: the v, ``[chunk, slots, value_dim]``; overwritten.
        mean: ``[chunk, rows, value_dim]``.
        own: ``[chunk, 1, slots]``.
        pair: of each slot and the next, ``[chunk, 1, slots]``; the last is 0.
        spare: memory of the size of `odds`.

    Returns:
        ``[chunk, rows]``.
    """
    # subtracted from values and rows, so that no large common part is squared and then cancelled
    centre = torch.nan_to_num(values.mean(1, keepdim=True), nan=0.0, posinf=0.0, neginf=0.0)
    values, mean = values.sub_(centre), mean - centre
    square = values.square().sum(-1)[:, None]
    beside = (values[:, :-1] * values[:, 1:]).sum(-1)[:, None]
    ahead, following, pair = odds[..., :-1], odds[..., 1:], pair[..., :-1]
    form = torch.mul(odds, own * square, out=spare)
    form[..., :-1].addcmul_(following, beside * pair, value=-2)
    total = form.mul_(odds).sum(-1)
    h = torch.mul(odds, own, out=spare)
    h[..., :-1].addcmul_(following, pair, value=-1)
    h[..., 1:].addcmul_(ahead, pair, value=-1)
    h.mul_(odds)
    total.add_((mean * torch.bmm(h, values)).sum(-1), alpha=-2).add_(mean.square().sum(-1) * h.sum(-1))
    # a sum of squares, up to rounding
    return total.clamp_(min=0.0)
