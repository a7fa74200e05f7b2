"""The public functions of context parallelism: each rank calls with its own tokens, and gets their output."""

from dataclasses import dataclass
from datetime import timedelta

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from hyperattention.call import Call, Masking, checked_call
from hyperattention.distributed.exchange import Exchange
from hyperattention.distributed.group import Group
from hyperattention.distributed.header import Header, agree
from hyperattention.distributed.numbers import number_of, number_of_float
from hyperattention.distributed.order import Contiguous, Order
from hyperattention.distributed.plan import Plan, Way, way_of
from hyperattention.distributed.traffic import DistributedResult, Traffic
from hyperattention.methods.base import AttentionMethod
from hyperattention.methods.pooled_chunks import PooledChunks
from hyperattention.problem import Problem
from hyperattention.transforms import refuse_transforms

_CONTIGUOUS = Contiguous()


def attention(
    query: Float[Tensor, "batch heads queries head_dim"],
    key: Float[Tensor, "batch kv_heads keys head_dim"],
    value: Float[Tensor, "batch kv_heads keys value_dim"],
    is_causal: bool = False,
    *,
    mesh: DeviceMesh,
    context: str | None = None,
    heads: str | None = None,
    method: AttentionMethod | None = None,
    gather: bool = False,
    order: Order = _CONTIGUOUS,
    scale: float | None = None,
    enable_gqa: bool = False,
    key_mask: Bool[Tensor, "batch keys"] | None = None,
    seed: int = 0,
    layer: int = 0,
    timeout: timedelta | None = None,
    check_finite: bool = False,
) -> Float[Tensor, "batch heads queries value_dim"]:
    """Compute attention of this rank's queries over the keys of all ranks.

    The output equals, to rounding, that of `hyperattention.attention` with the same method and seed on one machine that
    holds the entire sequence. All ranks of the context dimension must call, with their own tokens; for gradients all must
    run backward. Arguments that do not fit raise an error on every rank.

    Args:
        query: queries of this rank's tokens.
        key: keys of the same tokens.
        value: values of the same tokens.
        is_causal: whether a query sees only keys at or before its position.
        mesh: the device mesh.
        context: name of the mesh dimension that shares the tokens; None if the mesh has one dimension.
        heads: name of the mesh dimension that shares heads evenly, as tensor parallelism does, so that every head draws what
            it draws on one machine; None if each rank holds all heads.
        method: the method; None for `PooledChunks()`. Any other method needs `gather`.
        gather: whether keys and values of all ranks are gathered, so that `Exact()` and every `Method` of stages that look
            at their own tile and earlier tokens can run; what moves then grows with the length.
        order: which positions each rank holds: `Contiguous()` or `HeadTail()`.
        scale: factor of the scores; 1 / sqrt(head_dim) if None.
        enable_gqa: whether several query heads may share a kv head.
        key_mask: True where a key of this rank may be attended to.
        seed: seed of every draw.
        layer: layer of the model.
        timeout: time that each exchange may take; None for the limit of the process group.
        check_finite: whether to refuse NaN and infinity.

    Returns:
        the output of this rank's tokens, in the dtype of the query.
    """
    return measured_attention(
        query,
        key,
        value,
        is_causal,
        mesh=mesh,
        context=context,
        heads=heads,
        method=method,
        gather=gather,
        order=order,
        scale=scale,
        enable_gqa=enable_gqa,
        key_mask=key_mask,
        seed=seed,
        layer=layer,
        timeout=timeout,
        check_finite=check_finite,
    ).out


def measured_attention(
    query: Float[Tensor, "batch heads queries head_dim"],
    key: Float[Tensor, "batch kv_heads keys head_dim"],
    value: Float[Tensor, "batch kv_heads keys value_dim"],
    is_causal: bool = False,
    *,
    mesh: DeviceMesh,
    context: str | None = None,
    heads: str | None = None,
    method: AttentionMethod | None = None,
    gather: bool = False,
    order: Order = _CONTIGUOUS,
    scale: float | None = None,
    enable_gqa: bool = False,
    key_mask: Bool[Tensor, "batch keys"] | None = None,
    seed: int = 0,
    layer: int = 0,
    timeout: timedelta | None = None,
    check_finite: bool = False,
) -> DistributedResult:
    """Compute attention as `attention` does; return the output, its log-sum-exp, and the bytes that moved.

    Args:
        query: queries. This and all other arguments are as for `attention`.
        key: keys.
        value: values.
        is_causal: whether a query sees only keys at or before its position.
        mesh: the device mesh.
        context: name of the mesh dimension that shares the tokens.
        heads: name of the mesh dimension that shares heads.
        method: the method.
        gather: whether keys and values of all ranks are gathered.
        order: which positions each rank holds.
        scale: factor of the scores.
        enable_gqa: whether several query heads may share a kv head.
        key_mask: True where a key of this rank may be attended to.
        seed: seed of every draw.
        layer: layer of the model.
        timeout: time that each exchange may take.
        check_finite: whether to refuse NaN and infinity.

    Returns:
        the output, its log-sum-exp, and the traffic of the forward pass.
    """
    place = _Place.of(mesh, context, heads)
    group = Group(mesh.get_group(place.context), _wire_device(mesh), timeout)
    try:
        call = _checked(query, key, value, key_mask, is_causal, scale, enable_gqa, seed, layer, check_finite)
        way = _way(call, order, group, PooledChunks() if method is None else method, gather)
    except Exception as error:
        agree(group, Header(0, {}, f"{type(error).__name__}: {error}"))
        raise
    lengths = agree(group, Header(call.query.shape[2], _same(call, way, order, gather)))
    plan = Plan.of(group, way, order.segments(lengths), is_causal)
    group.plan = plan.number
    found = Exchange(group, plan, way, _problem(call, place.first_head(call))).run()
    size = call.key.shape[0] * call.key.shape[1] * (call.key.shape[3] + call.value.shape[3]) * call.key.element_size()
    ring = (sum(lengths) - lengths[group.rank]) * size
    return DistributedResult(found.out, found.lse, Traffic.of(group.rounds, ring))


@dataclass(frozen=True)
class _Place:
    """Dimensions of a mesh, and where this rank stands in that of the heads."""

    context: str | None
    part_of_heads: int

    @classmethod
    def of(cls, mesh: DeviceMesh, context: str | None, heads: str | None) -> "_Place":
        if not isinstance(mesh, DeviceMesh):
            raise TypeError(f"mesh={mesh!r}: it must be a DeviceMesh, as init_device_mesh makes one")
        names = mesh.mesh_dim_names or ()
        for argument, name in (("context", context), ("heads", heads)):
            if name is not None and name not in names:
                raise ValueError(f"{argument}={name!r} names no dimension of the mesh, which has {names}: name one of them")
        if context is None and mesh.ndim != 1:
            raise ValueError(f"the mesh has dimensions {names}: name the one that shares the tokens with context=...")
        if context is not None and context == heads:
            raise ValueError(f"context and heads are both {context!r}: they must be different dimensions of the mesh")
        return cls(context, 0 if heads is None else mesh.get_local_rank(heads))

    def first_head(self, call: Call) -> int:
        """Return the index of this rank's first kv head in the layer."""
        return self.part_of_heads * call.key.shape[1]


def _wire_device(mesh: DeviceMesh) -> torch.device:
    return torch.device(mesh.device_type, torch.cuda.current_device()) if mesh.device_type == "cuda" else torch.device("cpu")


def _checked(
    query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None, is_causal: bool, scale: float | None,
    enable_gqa: bool, seed: int, layer: int, check_finite: bool,
) -> Call:  # fmt: skip
    masking = Masking(None, key_mask, is_causal, "upper_left")
    options = {"enable_gqa": enable_gqa, "seed": seed, "layer": layer, "check_finite": check_finite}
    call = checked_call(query, key, value, masking, dropout_p=0.0, scale=scale, **options)
    refuse_transforms("attention on several ranks", call.query, call.key, call.value)
    if call.query.shape[2] != call.key.shape[2]:
        raise ValueError(
            f"query {tuple(query.shape)}, key {tuple(key.shape)}: a rank must hold queries and keys of the same tokens"
        )
    return call


def _way(call: Call, order: Order, group: Group, method: AttentionMethod, gather: bool) -> Way:
    if not isinstance(order, Order):
        raise TypeError(f"order={order!r}: it must be Contiguous() or HeadTail()")
    if call.key.device.type != group.device.type:
        raise ValueError(f"key is on {call.key.device}, the mesh on {group.device}: move the tensors to the mesh's devices")
    return way_of(method, gather)


def _same(call: Call, way: Way, order: Order, gather: bool) -> dict[str, int]:
    """Name what must be the same on all ranks of the context dimension."""
    tensors = call.query, call.key, call.value
    return {
        "batch": call.query.shape[0],
        "heads": call.query.shape[1],
        "kv_heads": call.key.shape[1],
        "head_dim": call.key.shape[3],
        "value_dim": call.value.shape[3],
        "dtype": number_of(str(call.key.dtype)),
        "is_causal": int(call.masking.is_causal),
        "key_mask": int(call.live is not None),
        "scale": number_of_float(call.scale),
        "seed": call.seed,
        "layer": call.layer,
        "method": number_of(repr(way)),
        "gather": int(gather),
        "order": number_of(repr(order)),
        "requires_grad": int(torch.is_grad_enabled() and any(x.requires_grad for x in tensors)),
    }


def _problem(call: Call, first_head: int) -> Problem:
    return Problem(
        q=call.query,
        k=call.key,
        v=call.value,
        scale=call.scale,
        causal=call.masking.is_causal,
        seed=call.seed,
        layer=call.layer,
        heads=tuple(range(first_head, first_head + call.key.shape[1])),
        key_mask=call.live,
    )
