"""The feature-map kernel as a torch operator, with its shapes and its gradient: compilers see one node.

On a GPU it runs the Triton kernels if Triton is installed, supports the tensors, and rows see all keys or are causal by
declaration; otherwise the PyTorch kernel. The choice looks at shapes, dtypes and arguments, at no values.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hyperattention.kernels.backend import triton_reads
from hyperattention.kernels.feature import reference as feature_torch
from hyperattention.kernels.feature.powers import POWERS
from hyperattention.transforms import refuse_batched_gradients, refuse_second_derivatives, refuse_transforms, refuse_vmap

# wider features or values would not fit a program's registers and shared memory
WIDEST = 128


@torch.library.custom_op("hyperattention::feature_attention", mutates_args=())
def _feature_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_log_scale: Tensor,
    key_log_scale: Tensor,
    row_limit: Tensor | None,
    offset: int | None,
    power: int,
) -> tuple[Tensor, Tensor]:
    tensors = query, key, value, query_log_scale, key_log_scale
    if _triton_serves(query, key, value, row_limit):
        from hyperattention.kernels.feature import triton_forward

        return triton_forward.forward(*tensors, offset, power)
    return feature_torch.forward(*tensors, _limit(query, key, row_limit, offset), power)


def _triton_serves(query: Tensor, key: Tensor, value: Tensor, row_limit: Tensor | None) -> bool:
    """Return whether the Triton kernels read these tensors: of one dtype, and without a limit of each row's own."""
    same = query.dtype == key.dtype == value.dtype
    return row_limit is None and same and triton_reads(query, key, value) and max(query.shape[3], value.shape[3]) <= WIDEST


def _limit(query: Tensor, key: Tensor, row_limit: Tensor | None, offset: int | None) -> Tensor:
    """Return how many leading keys each row sees, if it is all of them or causal."""
    if row_limit is not None:
        return row_limit
    rows, keys = query.shape[2], key.shape[2]
    if offset is None:
        return torch.full((1, rows), keys, dtype=torch.int64, device=query.device)
    return torch.arange(offset + 1, offset + 1 + rows, dtype=torch.int64, device=query.device)[None]


@_feature_attention.register_fake
def _(query, key, value, *others):
    lse = query.new_empty(query.shape[:-1], dtype=feature_torch.accumulation_dtype(query, key, value))
    return value.new_empty((*query.shape[:-1], value.shape[-1])), lse


@torch.library.custom_op("hyperattention::feature_attention_backward", mutates_args=())
def _feature_attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_log_scale: Tensor,
    key_log_scale: Tensor,
    out: Tensor,
    lse: Tensor,
    row_limit: Tensor | None,
    offset: int | None,
    power: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    grads, saved = (grad_out, grad_lse), (query, key, value, query_log_scale, key_log_scale, out, lse)
    if _triton_serves(query, key, value, row_limit):
        from hyperattention.kernels.feature import triton_backward

        return triton_backward.backward(grads, saved, offset, power)
    return feature_torch.backward(grads, saved, _limit(query, key, row_limit, offset), power)


@_feature_attention_backward.register_fake
def _(grad_out, grad_lse, query, key, value, query_log_scale, key_log_scale, *rest):
    return tuple(x.new_empty(x.shape) for x in (query, key, value, query_log_scale, key_log_scale))


def _setup_context(ctx, inputs, output):
    *inputs, row_limit, ctx.offset, ctx.power = inputs
    ctx.save_for_backward(*inputs, *output, row_limit)


def _backward(ctx, grad_out, grad_lse):
    refuse_batched_gradients("attention over features", grad_out, grad_lse)
    return *_feature_attention_backward(grad_out, grad_lse, *ctx.saved_tensors, ctx.offset, ctx.power), None, None, None


_feature_attention.register_autograd(_backward, setup_context=_setup_context)
refuse_vmap(_feature_attention, "attention over features")
refuse_second_derivatives(_feature_attention_backward, "attention over features")


def feature_attention(
    query_features: Float[Tensor, "batch heads queries features"],
    key_features: Float[Tensor, "batch kv_heads keys features"],
    value: Float[Tensor, "batch kv_heads keys value_dim"],
    *,
    query_log_scale: Float[Tensor, "batch heads queries"] | None = None,
    key_log_scale: Float[Tensor, "batch kv_heads keys"] | None = None,
    row_limit: Int[Tensor, "#batch queries"] | None = None,
    is_causal: bool = False,
    first_query: int = 0,
    first_key: int = 0,
    power: int = 1,
) -> tuple[Float[Tensor, "batch heads queries value_dim"], Float[Tensor, "batch heads queries"]]:
    """Compute attention in linear time, with weights that are powers of products of features of a query and of a key.

    w_ij = exp(a_i + b_j) (phi_i . psi_j)^power  for  first_key <= j < limit_i,    out_i = sum_j w_ij v_j / sum_j w_ij

    phi_i . psi_j may be a random estimate of exp(q_i . k_j), or a power of q_i . k_j; with power 2, a sketch of one. The log
    scales a and b hold factors that would overflow in the features, such as the logarithm of the largest entry, so that
    features are about one in size; -inf removes a key or a row. A row's sums are relative to exp(a_i + b), where b is its
    largest visible b_j: terms below 2^-100 of it (2^-1000 in float64) may count as 0.

    With power 2 the products of pairs of features exist for a few hundred rows at a time (`plan.STEP_NUMBERS`), never for a
    whole sequence; what stays is the state, features (features + 1) / 2 times value_dim + 1 numbers for each kv head.

    Features may have either sign, but sums of weights must be positive: a row whose denominator is below the smallest normal
    number, in units of at most 2^24 times that, has out 0, lse -inf and no gradient, like a row that sees no key. NaN is
    never hidden. It may spread from a key that one row sees to rows whose limits are less than a block before that key.

    Source: Choromanski et al., 2021 (arXiv:2009.14794), Performers: positive features of the softmax kernel; Katharopoulos
    et al., 2020 (arXiv:2006.16236), causal attention by running sums; Kacham et al., 2024 (arXiv:2310.01655),
    PolySketchFormer: causal products block by block, squares that are never negative.   Differs: features are inputs; lse is
    returned, so that results can be merged; any limits; grouped kv heads.
    Cost: O((queries + keys) * features^power * value_dim) time, O(queries + keys) memory.
    Guarantee: exact for these weights.

    Args:
        query_features: phi; `heads` must be a multiple of `kv_heads`.
        key_features: psi; query head h reads kv head h // (heads // kv_heads).
        value: values.
        query_log_scale: log scale a of each query; None = 0.
        key_log_scale: log scale b of each key; None = 0.
        row_limit: number of leading keys each query sees, `first_key` included, in any order: i + 1 for causality, as from
            `exact.visible_keys`; the first key of a window that an earlier stage took; the number of live keys. None = all.
        is_causal: whether query i sees keys up to `first_query + i`: as those limits, but known to be causal without
            a look at them, so that the Triton kernel can serve them.
        first_query: position of the first query if `is_causal`, such as the number of keys less that of the queries.
        first_key: leading keys that no row sees, such as sinks that an earlier stage took.
        power: of the products of features: 1, or 2, which makes weights of any features non-negative.

    Returns:
        normalised rows in the dtype of `value`, and the natural log of each row's denominator, in float32 (float64 if any
        of the first three is).

    Raises:
        ValueError: if `heads` is not a multiple of `kv_heads`, `first_key` is negative, `power` is not 1 or 2, both
            `row_limit` and `is_causal` are given, or `first_query` without `is_causal`.
    """
    scales = (x for x in (query_log_scale, key_log_scale) if x is not None)
    refuse_transforms("attention over features", query_features, key_features, value, *scales)
    heads, kv_heads = query_features.shape[1], key_features.shape[1]
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"{heads} query heads over {kv_heads} kv heads: must be a multiple; check the head axis")
    if power not in POWERS:
        raise ValueError(f"power={power!r}: must be 1 or 2; expand the features yourself for higher powers, with power=1")
    if first_key < 0:
        raise ValueError(f"first_key={first_key}: must be 0 or more; 0 keeps every key")
    if is_causal and row_limit is not None:
        raise ValueError(
            f"is_causal=True with row_limit of shape {tuple(row_limit.shape)}: must be one of them; drop the other"
        )
    if first_query and not is_causal:
        raise ValueError(f"first_query={first_query} without is_causal=True: it has no effect; pass both, or row_limit")
    if query_log_scale is None:
        query_log_scale = query_features.new_zeros(query_features.shape[:-1])
    if key_log_scale is None:
        key_log_scale = key_features.new_zeros(key_features.shape[:-1])
    return _feature_attention(
        query_features,
        key_features[:, :, first_key:],
        value[:, :, first_key:],
        query_log_scale,
        key_log_scale[:, :, first_key:],
        None if row_limit is None else row_limit.long() - first_key,
        first_query - first_key if is_causal else None,
        power,
    )
