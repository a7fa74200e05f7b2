"""One call of the public functions: its arguments, checked and cast, and its masks in a form that key lists can follow."""

from dataclasses import dataclass

from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from hyperattention.inputs import check_inputs, check_masks, check_tensors, dense_mask, key_mask_of, narrowed
from hyperattention.problem import Problem, compact
from hyperattention.transforms import scale_of


@dataclass(frozen=True)
class Masking:
    """Which query may attend to which key, as the caller's arguments say it.

    Args:
        attn_mask: SDPA's mask, boolean or added to the scores.
        key_mask: True where a key may be attended to.
        is_causal: whether query i sees only keys at or before its position.
        causal_align: ``"upper_left"`` or ``"lower_right"``.
    """

    attn_mask: Shaped[Tensor, "..."] | None
    key_mask: Bool[Tensor, "batch keys"] | None
    is_causal: bool
    causal_align: str


@dataclass(frozen=True)
class Call:
    """The arguments of one call, after every check.

    Args:
        query: queries, in the dtype of autocast if autocast is on.
        key: keys, likewise.
        value: values, likewise.
        masking: which query may attend to which key.
        scale: factor of the scores.
        seed: seed of every draw.
        layer: layer of the model.
    """

    query: Float[Tensor, "batch heads queries head_dim"]
    key: Float[Tensor, "batch kv_heads keys head_dim"]
    value: Float[Tensor, "batch kv_heads keys value_dim"]
    masking: Masking
    scale: float
    seed: int
    layer: int

    @property
    def dense(self) -> Tensor | None:
        """A mask that no list of keys can express, which only exact attention reads."""
        return dense_mask(self.masking.attn_mask)

    @property
    def live(self) -> Bool[Tensor, "batch keys"] | None:
        """True where a key may be attended to; None where every key may."""
        return key_mask_of(self.masking.attn_mask, self.masking.key_mask, self.key)

    def problem(self, *, masked: bool = False) -> Problem:
        """Bring the call into normal form: masked keys removed, the position of the first query known.

        Args:
            masked: whether masked keys stay where they are, for a method that reads the key mask itself.

        Returns:
            the problem.
        """
        k, v, rank, live = self.key, self.value, None, self.live
        lower_right = self.masking.causal_align == "lower_right"
        if live is not None and not masked:
            k, v, rank = compact(k, v, live)
        return Problem(
            q=self.query,
            k=k,
            v=v,
            scale=self.scale,
            causal=self.masking.is_causal,
            offset=self.key.shape[2] - self.query.shape[2] if lower_right else 0,
            rank=rank,
            seed=self.seed,
            layer=self.layer,
            key_mask=live if masked else None,
        )


def checked_call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    masking: Masking,
    *,
    dropout_p: float,
    scale: float | None,
    enable_gqa: bool,
    seed: int,
    layer: int,
    check_finite: bool,
) -> Call:
    """Check the arguments of a call, and cast them as autocast asks.

    Args:
        query: queries.
        key: keys.
        value: values.
        masking: which query may attend to which key.
        dropout_p: must be 0.
        scale: factor of the scores; 1 / sqrt(head_dim) if None.
        enable_gqa: whether several query heads may share a kv head.
        seed: seed of every draw.
        layer: layer of the model.
        check_finite: whether to refuse NaN and infinity.

    Returns:
        the call; arguments that do not fit raise ValueError or TypeError, unsupported requests NotImplementedError.
    """
    check_tensors(query=query, key=key, value=value)
    query, key, value = narrowed(query, key, value)
    if masking.attn_mask is not None:
        mask = narrowed(masking.attn_mask)[0]
        masking = Masking(mask, masking.key_mask, masking.is_causal, masking.causal_align)
    check_inputs(query, key, value, enable_gqa=enable_gqa, dropout_p=dropout_p, seed=seed, check_finite=check_finite)
    check_masks(
        query, key, masking.attn_mask, masking.key_mask, is_causal=masking.is_causal, causal_align=masking.causal_align
    )
    return Call(query, key, value, masking, scale_of(scale, query.shape[-1]), seed, layer)
