"""Multi-head self-attention as a module that runs any method."""

from jaxtyping import Bool, Float
from torch import Tensor, nn

from hyperattention.attention import attention
from hyperattention.check import positive
from hyperattention.methods.base import AttentionMethod, check_method
from hyperattention.methods.exact import Exact


class MultiheadAttention(nn.Module):
    """Self-attention over a batch of sequences, like torch.nn.MultiheadAttention with batch_first, by any method.

    out = out_proj(attention(q_proj(x), k_proj(x), v_proj(x)))

    The parameters do not depend on the method: a state dict of one method loads into a module with another, which is how
    a method is dropped into trained weights. Draws of a method depend on the arguments `seed` and `layer` alone: the same
    seed repeats a pass bit for bit, and activation checkpointing draws the same keys again. A training loop passes its
    step as the seed, so that draws differ between steps.

    Args:
        embed_dim: width of the tokens; a multiple of `num_heads`.
        num_heads: number of query heads.
        method: the method; None for exact attention at every length.
        kv_heads: number of key and value heads, a divisor of `num_heads`; None for as many.
        bias: whether the four projections have a bias.
        is_causal: whether a token sees only itself and the tokens before it.
        layer: number of this layer in its model, so that layers draw independently.

    Raises:
        ValueError: if a number is not positive, or does not divide what it must divide.
        TypeError: if `method` is not an attention method.

    Example:
        >>> MultiheadAttention(64, 4, method=LevAttention(32))(tokens)
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        method: AttentionMethod | None = None,
        *,
        kv_heads: int | None = None,
        bias: bool = True,
        is_causal: bool = False,
        layer: int = 0,
    ) -> None:
        super().__init__()
        kv_heads = num_heads if kv_heads is None else kv_heads
        positive("MultiheadAttention", embed_dim=embed_dim, num_heads=num_heads, kv_heads=kv_heads)
        if embed_dim % num_heads:
            raise ValueError(
                f"embed_dim={embed_dim} is no multiple of num_heads={num_heads}: heads have equal widths; give a multiple"
            )
        if num_heads % kv_heads:
            raise ValueError(
                f"num_heads={num_heads} is no multiple of kv_heads={kv_heads}: query heads share kv heads "
                "evenly; give a divisor"
            )
        if method is not None:
            check_method(method)
        self.embed_dim, self.num_heads, self.kv_heads = embed_dim, num_heads, kv_heads
        self.method: AttentionMethod = Exact() if method is None else method
        self.is_causal, self.layer = is_causal, layer
        width = embed_dim // num_heads
        self.q_proj = nn.Linear(embed_dim, embed_dim, bias=bias)
        self.k_proj = nn.Linear(embed_dim, kv_heads * width, bias=bias)
        self.v_proj = nn.Linear(embed_dim, kv_heads * width, bias=bias)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias)

    def forward(
        self,
        x: Float[Tensor, "batch tokens embed_dim"],
        key_mask: Bool[Tensor, "batch keys"] | None = None,
        *,
        seed: int = 0,
    ) -> Float[Tensor, "batch tokens embed_dim"]:
        """Attend.

        Args:
            x: tokens, batch first.
            key_mask: True where a token may be attended to.
            seed: seed of every draw.

        Returns:
            tokens of the same shape; a token that sees no token gets the bias of `out_proj`.

        Raises:
            ValueError: if `x` has another shape.
        """
        if x.ndim != 3 or x.shape[2] != self.embed_dim:
            raise ValueError(f"x has shape {tuple(x.shape)}: it must be [batch, tokens, embed_dim={self.embed_dim}]")
        q, k, v = (
            proj(x).unflatten(2, (heads, -1)).transpose(1, 2)
            for proj, heads in (
                (self.q_proj, self.num_heads),
                (self.k_proj, self.kv_heads),
                (self.v_proj, self.kv_heads),
            )
        )
        out = attention(
            q,
            k,
            v,
            is_causal=self.is_causal,
            enable_gqa=True,
            method=self.method,
            key_mask=key_mask,
            seed=seed,
            layer=self.layer,
        )
        return self.out_proj(out.transpose(1, 2).flatten(2))

    def extra_repr(self) -> str:
        """Show the sizes and the method."""
        heads = f"{self.num_heads}" if self.kv_heads == self.num_heads else f"{self.num_heads}, kv_heads={self.kv_heads}"
        return f"{self.embed_dim}, {heads}, is_causal={self.is_causal}, method={self.method!r}"
