"""A self-attention layer with polynomial weights, in linear time, which decodes from a small state."""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hyperattention.features.learned_sketch import LearnedSketch
from hyperattention.features.polynomial_sketch import (
    PolynomialSketch,
    RandomSketch,
    check_degree,
    check_size,
)
from hyperattention.kernels.feature.operator import feature_attention
from hyperattention.kernels.polynomial import polynomial_attention, polynomial_blocks
from hyperattention.merge import merge
from hyperattention.nn.poly_sketch_state import PolySketchState
from hyperattention.nn.rotary import rotate
from hyperattention.types import Partial


class PolySketchAttention(nn.Module):
    """Causal self-attention with weights that are even powers of products, sketched beyond a token's own block.

    w_ij = (q'_i . k'_j)^p              in the block of i, if `local`;   q', k' = LayerNorm(q), LayerNorm(k)
    w_ij = (M(q_i) . M(k_j))^2          in earlier blocks,               M = a sketch of degree p / 2
    out_i = sum_{j <= i} w_ij v_j / (1 + sum_{j <= i} w_ij)

    M is learned, one for queries and keys of all heads, or random: then (M(q') . M(k'))^2 estimates (q' . k')^p.
    Source: Kacham et al., 2024 (arXiv:2310.01655), PolySketchFormer; the published code (google-research,
    `polysketchformer`) was read, the paper remembered.   Differs: any length; decoding; random sketches scaled to estimate
    the powers (the published ones are sketch_size^2 times too small), of the same normalised vectors as the local weights
    (the published code has a LayerNorm for each); rotary positions pair halves. Sinusoidal positions are left to the model.
    Cost: sketch_size^2 (head_dim + 1) / 2 products a token and head to read the sums and as many to add to them, and
    block * head_dim near the token.   Guarantee: weights are not negative; for random sketches that of `PolynomialSketch`.

    Args:
        embed_dim: width of the tokens.
        num_heads: heads; must divide `embed_dim`.
        degree: p, even. A random sketch needs 2, 4, 8 or 16; of a learned one, only the local weights have this degree.
        sketch_size: r, the number of features of M; 32 and 64 are published. It may be larger than `block`.
        block: tokens in a block. As many are kept in decoding.
        learned: whether M is learned; otherwise it is random.
        local: whether weights within a block are exact; otherwise they are sketched like all others.
        rotary_base: base of the rotary positions; None for no positions.
        seed: seed of a random sketch. Give each layer another one: layers that share it share their errors.
        device: device of the parameters.
        dtype: dtype of the parameters.

    Raises:
        ValueError: if a size is not positive, the heads do not divide the width, or the degree cannot be had.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        degree: int = 4,
        sketch_size: int = 32,
        block: int = 256,
        learned: bool = True,
        local: bool = True,
        rotary_base: float | None = 10_000.0,
        seed: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        owner = "PolySketchAttention"
        sizes = {"embed_dim": embed_dim, "num_heads": num_heads, "sketch_size": sketch_size, "block": block}
        for name, size in sizes.items():
            check_size(owner, name, size)
        check_degree(owner, degree)
        if embed_dim % num_heads:
            raise ValueError(f"{owner}(embed_dim={embed_dim}, num_heads={num_heads}): the heads must divide the width")
        self.num_heads, self.head_dim, self.block = num_heads, embed_dim // num_heads, block
        self.degree, self.local, self.rotary_base = degree, local, rotary_base
        if rotary_base is not None and (self.head_dim % 2 or not rotary_base > 0):
            raise ValueError(
                f"{owner}(rotary_base={rotary_base!r}) with heads of width {self.head_dim}: the base must be positive and "
                "the width even; rotary_base=None leaves positions out"
            )
        options: dict = {"device": device, "dtype": dtype}
        self.in_projection = nn.Linear(embed_dim, 3 * embed_dim, bias=False, **options)
        self.out_projection = nn.Linear(embed_dim, embed_dim, bias=False, **options)
        # a learned sketch has norms of its own
        self.learned, normed = learned, local or not learned
        self.query_norm, self.key_norm = (
            nn.LayerNorm(self.head_dim, **options) if normed else nn.Identity() for _ in range(2)
        )
        random, weight = PolynomialSketch(degree, sketch_size, seed) if not learned else None, self.in_projection.weight
        self.sketch = (
            # where and as the projections are, which follow the defaults of torch
            RandomSketch(random, self.head_dim, device=weight.device, dtype=weight.dtype)
            if random
            else LearnedSketch(self.head_dim, sketch_size, **options)
        )

    def forward(self, x: Float[Tensor, "batch tokens embed_dim"]) -> Float[Tensor, "batch tokens embed_dim"]:
        """Attend to the tokens up to each token.

        Args:
            x: any number of tokens, of positions 0, 1, ...

        Returns:
            the layer's output.
        """
        q, k, v = self._heads(x, 0)
        query, key, query_sketch, key_sketch = self._prepare(q, k)
        first = torch.arange(x.shape[1], dtype=torch.int64, device=x.device)[None] // self.block * self.block
        limit = first if self.local else None
        past = feature_attention(query_sketch, key_sketch, v, row_limit=limit, is_causal=not self.local, power=2)
        partials = [self._published(Partial(*past))]
        if self.local:
            partials.append(polynomial_blocks(query, key, v, self.degree, self.block))
        return self._finish(partials)

    def empty_state(self, batch: int) -> PolySketchState:
        """Return the state before the first token.

        Args:
            batch: number of texts.

        Returns:
            the state for `step`.
        """
        like = self.in_projection.weight
        features = self.sketch.size
        lead = batch, self.num_heads
        total = like.new_zeros(
            (*lead, features * (features + 1) // 2, self.head_dim + 1), dtype=torch.promote_types(like.dtype, torch.float32)
        )
        near = (like.new_zeros((*lead, 0, width)) for width in (self.head_dim, features, self.head_dim))
        return PolySketchState(total, *near, position=0)

    def step(
        self, x: Float[Tensor, "batch tokens embed_dim"], state: PolySketchState | None = None
    ) -> tuple[Float[Tensor, "batch tokens embed_dim"], PolySketchState]:
        """Read the next tokens of a text, one or many; the results are those of `forward` on the whole text.

        Args:
            x: the next tokens.
            state: the state after the earlier tokens; None before the first.

        Returns:
            the layer's output for these tokens, and the state after them.

        Raises:
            ValueError: if the state is of another number of texts.
        """
        state = self.empty_state(len(x)) if state is None else state
        if state.total.shape[0] != len(x):
            raise ValueError(f"x has {len(x)} texts, and the state {state.total.shape[0]}: give each batch its own state")
        done, outs = 0, []
        while done < x.shape[1]:
            room = self.block - state.key.shape[2]
            out, state = self._step(x[:, done : done + room], state)
            outs.append(out)
            done += room
        return torch.cat(outs, 1) if outs else x.new_zeros(x.shape), state

    def extra_repr(self) -> str:
        """Return the settings."""
        return f"num_heads={self.num_heads}, degree={self.degree}, block={self.block}, local={self.local}"

    def _step(self, x: Tensor, state: PolySketchState) -> tuple[Tensor, PolySketchState]:
        # tokens of one block
        q, k, v = self._heads(x, state.position)
        query, key, query_sketch, key_sketch = self._prepare(q, k)
        past = self._published(state.read_past(query_sketch))
        state = state.add(key, key_sketch, v)
        if self.local:
            near = polynomial_attention(query, state.key, state.value, self.degree)
        else:
            near = self._published(polynomial_attention(query_sketch, state.key_sketch, state.value, 2))
        out = self._finish([past, near])
        return out, state.sum_up() if state.key.shape[2] == self.block else state

    def _heads(self, x: Tensor, first: int) -> tuple[Tensor, Tensor, Tensor]:
        """Project tokens to queries, keys and values, ``[batch, heads, tokens, head_dim]``, with positions."""
        if x.ndim != 3 or x.shape[-1] != self.in_projection.in_features:
            raise ValueError(
                f"x is {tuple(x.shape)}: must be [batch, tokens, embed_dim={self.in_projection.in_features}]; "
                "a single text needs a batch axis, x[None]"
            )
        q, k, v = self.in_projection(x).unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        if self.rotary_base is not None:
            q, k = (rotate(each, first, self.rotary_base) for each in (q, k))
        return q, k, v

    def _prepare(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return what the exact weights read of queries and keys, and what the sketched weights read."""
        near = self.query_norm(q), self.key_norm(k)
        # a random sketch reads unit vectors, so that no degree overflows
        far = (q, k) if self.learned else tuple(x * self.head_dim**-0.5 for x in near)
        return *near, self.sketch(far[0]), self.sketch(far[1])

    def _published(self, sketched: Partial) -> Partial:
        # undoes the scale of the vectors that a random sketch reads
        return Partial(sketched.out, sketched.lse + (0.0 if self.learned else self.degree * math.log(self.head_dim)))

    def _finish(self, partials: list[Partial]) -> Tensor:
        # the 1 in the denominator: a weight of 1 for a value of 0
        one = Partial(torch.zeros_like(partials[0].out), torch.zeros_like(partials[0].lse))
        return self.out_projection(merge([*partials, one]).out.transpose(1, 2).flatten(2))
