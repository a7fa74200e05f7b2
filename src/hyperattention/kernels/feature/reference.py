"""The feature-map kernel in PyTorch: the reference for every other feature kernel.

The weight of a pair is a power, 1 or 2, of a product of features of the query and features of the key. So a row needs no
pairs, only a *state*: the sum over its visible keys of (expanded) features times values, ``[features, value_dim + 1]`` or
``[features (features + 1) / 2, value_dim + 1]``, the last column for the denominator.

    w_ij = exp(a_i + b_j) (phi_i . psi_j)^power,    out_i = sum_{j < limit_i} w_ij v_j / sum_{j < limit_i} w_ij,
    lse_i = log of the denominator

Forward and backward are the same sums (`sums`) with exchanged parts. No tensor of queries x keys, or of keys x features x
value_dim, is ever allocated; expanded features exist for a few hundred rows at a time (`plan.STEP_NUMBERS`).

Source: Katharopoulos et al., 2020 (arXiv:2006.16236), states as running sums; Kacham et al., 2024 (arXiv:2310.01655),
PolySketchFormer, its causal product block by block, and its squares of sketches.   Differs: any limits, not only causal
ones; log scales in addition to the features, handled as softmax handles scores; no constant is added to the denominator; of
the products of pairs of features the state keeps the symmetric half.
Cost: O((queries + keys) * features^power * value_dim) and a block of pairs per row.   Guarantee: exact for these weights.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from hyperattention.kernels.feature.columns import Columns
from hyperattention.kernels.feature.course import course_of
from hyperattention.kernels.feature.keys import Keys
from hyperattention.kernels.feature.plan import Plan, plan_of
from hyperattention.kernels.feature.powers import POWERS, Power
from hyperattention.kernels.feature.scales import log_of
from hyperattention.kernels.feature.sums import blocks, product_of, pull, read
from hyperattention.kernels.feature.workspace import Workspace


def _by_list(x: Tensor, kv_heads: int) -> Tensor:
    """Pack the heads of a group: ``[batch, heads, tokens, ...]`` to ``[lists, rows, ...]``."""
    return x.unflatten(1, (kv_heads, x.shape[1] // kv_heads)).transpose(2, 3).flatten(2, 3).flatten(0, 1)


def _by_head(x: Tensor, kv_heads: int, like: Tensor) -> Tensor:
    """Undo `_by_list`, into new memory, for a tensor with the batch entries, heads and tokens of `like`."""
    batch, heads, tokens = like.shape[:3]
    x = x.unflatten(0, (batch, kv_heads)).unflatten(2, (tokens, heads // kv_heads))
    return x.transpose(2, 3).flatten(1, 2).contiguous()


def _limits(row_limit: Tensor, lists: int, group: int, keys: int) -> Iterator[tuple[slice, Tensor]]:
    """Yield the lists that share their limits, and the limit of each of their rows."""
    each = lists // max(1, len(row_limit))
    limits = row_limit.clamp(0, keys)
    for i, limit in enumerate(limits if group == 1 else limits.repeat_interleave(group, 1)):
        yield slice(i * each, (i + 1) * each), limit


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    """Return the dtype of sums and lse: float64 if any tensor is float64, otherwise float32."""
    return torch.float64 if torch.float64 in {x.dtype for x in tensors} else torch.float32


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_log_scale: Tensor,
    key_log_scale: Tensor,
    row_limit: Tensor,
    power: int = 1,
) -> tuple[Tensor, Tensor]:
    """Compute attention with weights that are powers of products of features.

    Args:
        query: features of the queries, ``[batch, heads, queries, features]``.
        key: features of the keys, ``[batch, kv_heads, keys, features]``.
        value: ``[batch, kv_heads, keys, value_dim]``.
        query_log_scale: a, ``[batch, heads, queries]``.
        key_log_scale: b, ``[batch, kv_heads, keys]``.
        row_limit: number of leading keys each query sees, ``[1 or batch, queries]``; limited to 0 and the number of keys.
        power: 1 or 2.

    Returns:
        out ``[batch, heads, queries, value_dim]`` in the dtype of `value`, and lse ``[batch, heads, queries]``, float32 or
        float64; 0 and -inf if a row's denominator is not positive.
    """
    kv_heads, dtype = key.shape[1], accumulation_dtype(query, key, value)
    rows, row_scale = _by_list(query, kv_heads), _by_list(query_log_scale, kv_heads).to(dtype)
    every, work = _keys(key, value, key_log_scale.to(dtype)), Workspace(dtype, key.device)
    lse, out = torch.empty_like(row_scale), value.new_empty((*rows.shape[:2], value.shape[-1]))
    # sums rounded to bfloat16 would be useless after some thousand keys
    with torch.autocast(query.device.type, enabled=False):
        for part, limit in _limits(row_limit, len(rows), query.shape[1] // kv_heads, key.shape[2]):
            results = rows[part], row_scale[part], out[part], lse[part]
            _attend(*results, every.of(part, slice(None)), limit, POWERS[power], work)
    return _by_head(out, kv_heads, query), _by_head(lse, kv_heads, query)


def _keys(key: Tensor, value: Tensor, log_scale: Tensor) -> Keys:
    # a value of one, whose weighted sum is the denominator
    one = torch.ones((), dtype=log_scale.dtype, device=log_scale.device).expand(len(log_scale.flatten(0, 1)), key.shape[2])
    return Keys.of_log(key.flatten(0, 1), Columns(value.flatten(0, 1), one), log_scale.flatten(0, 1))


def _attend(
    rows: Tensor, row_scale: Tensor, out: Tensor, lse: Tensor, keys: Keys, limit: Tensor, power: Power, work: Workspace
) -> None:
    """Write normalised rows and their lse for lists that share their limits."""
    features, width = rows.shape[2], out.shape[2]
    course = course_of(keys, plan_of(limit, power.expanded(features)))
    for block in blocks(keys, course, power, work):
        query = block.take(Columns(rows), power.padded(features), "query")
        total = read(block, query, product_of(block, query), power, keys.value.padded)
        denominator = total[..., width : width + 1]
        block.put(total[..., :width], denominator, out, torch.div)
        block.note(denominator, lse)
    # features of either sign can cancel; a sum below the smallest normal number counts as 0. NaN stays NaN
    empty = lse < torch.finfo(lse.dtype).tiny
    lse.copy_((row_scale + log_of(lse.masked_fill(empty, 1.0), course.base)).masked_fill_(empty, -torch.inf))
    nothing = lse == -torch.inf
    # rarely, and a whole pass over the output
    if bool(nothing.any()):
        out.masked_fill_(nothing[..., None], 0.0)


def backward(
    grads: tuple[Tensor, Tensor],
    saved: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor],
    row_limit: Tensor,
    power: int = 1,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute the exact gradient of `forward`, by the same sums with exchanged parts.

    With g_i and h_i the gradients of out_i and lse_i, r_i = exp(a_i - lse_i), u_i = (g_i, h_i - g_i . out_i), the slope of a
    row in (v_j, 1), p the power and s_ij = phi_i . psi_j:

        dphi_i = r_i sum_{j < limit_i} exp(b_j) p s_ij^(p - 1) (u_i . (v_j, 1)) psi_j,    da_i = h_i
        dpsi_j = exp(b_j) sum_{i: j < limit_i} r_i p s_ij^(p - 1) ((v_j, 1) . u_i) phi_i,    db_j = psi_j . dpsi_j / p
        dv_j = exp(b_j) sum_{i: j < limit_i} r_i s_ij^p g_i

    In the order of decreasing limits the rows that see a key come first, so that the sums for keys are over leading rows.

    Args:
        grads: gradients of out and of lse.
        saved: query, key, value and the log scales of queries and keys, then out and lse of the forward pass.
        row_limit: as in `forward`.
        power: 1 or 2.

    Returns:
        gradients of query, key, value and the two log scales, in their dtypes; 0 from rows without a denominator.
    """
    query, key, value, query_log_scale, key_log_scale, out, lse = saved
    kv_heads, dtype = key.shape[1], lse.dtype
    rows, row_scale, out, lse = (_by_list(x, kv_heads) for x in (query, query_log_scale, out, lse))
    grad_out, grad_lse = (_by_list(x, kv_heads).to(dtype) for x in grads)
    empty = lse == -torch.inf
    grad_lse = grad_lse.masked_fill(empty, 0.0)
    # rarely, and a whole copy
    if bool(empty.any()):
        grad_out = grad_out.masked_fill(empty[..., None], 0.0)
    share = (row_scale.to(dtype) - lse).masked_fill(empty, -torch.inf)  # log r
    slope = grad_lse - (grad_out * out).sum(-1)
    keys, work = _keys(key, value, key_log_scale.to(dtype)), Workspace(dtype, key.device)
    as_keys = Keys.of_log(rows, Columns(grad_out, slope), share)
    found = [torch.empty_like(x, dtype=dtype) for x in (rows, keys.key, keys.value.main)]
    with torch.autocast(query.device.type, enabled=False):
        for part, limit in _limits(row_limit, len(rows), query.shape[1] // kv_heads, key.shape[2]):
            some = as_keys.of(part, slice(None)), keys.of(part, slice(None))
            _gradients(*some, limit, POWERS[power], [x[part] for x in found], work)
    grad_rows, grad_keys, grad_values = found
    return (
        _by_head(grad_rows, kv_heads, query).to(query.dtype),
        grad_keys.view(key.shape).to(key.dtype),
        grad_values.view(value.shape).to(value.dtype),
        _by_head(grad_lse, kv_heads, query).to(query_log_scale.dtype),
        ((keys.key * grad_keys).sum(-1) / power).view(key_log_scale.shape).to(key_log_scale.dtype),
    )


def _gradients(rows: Keys, keys: Keys, limit: Tensor, power: Power, found: list[Tensor], work: Workspace) -> None:
    """Write gradients of rows, keys and values for lists that share their limits.

    Args:
        rows: queries as keys, their slopes as values.
        keys: keys.
        limit: of each row.
        power: of products of features.
        found: the gradients.
        work: memory.
    """
    expanded, count = power.expanded(rows.key.shape[2]), found[1].shape[1]
    plan = plan_of(limit, expanded)
    _slopes(rows, keys, plan, power, (found[0], None), work)
    if plan.order is not None:
        rows = rows.ordered(plan.order)
    # rows that see a key are the last ones: all but those with a limit up to it
    number = len(limit) - torch.bincount(limit, minlength=count + 1)[:count].cumsum(0)
    _slopes(keys, rows, plan_of(number.flip(0), expanded, mirrored=True), power, (found[1], found[2]), work)


def _slopes(rows: Keys, keys: Keys, plan: Plan, power: Power, found: tuple[Tensor, Tensor | None], work: Workspace) -> None:
    """Write the gradient of rows' features; if wanted, the sums of the values of keys, without their last number, too."""
    course, (gradient, sums) = course_of(keys, plan), found
    # 0 if a row sees no key
    scale = rows.scales.times(course.base)
    features, width = rows.key.shape[2], rows.value.main.shape[2]
    for block in blocks(keys, course, power, work):
        query = block.take(Columns(rows.key), power.padded(features), "query")
        slope = block.take(rows.value, rows.value.width, "slope")
        product = product_of(block, query) if power.degree > 1 or sums is not None else None
        some = block.part(scale)
        block.put(pull(block, query, slope, product, power)[:, :features].transpose(1, 2), some, gradient)
        if sums is not None and product is not None:
            block.put(read(block, query, product, power, width), some, sums)
