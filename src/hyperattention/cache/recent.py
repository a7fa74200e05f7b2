"""The latest keys and values of a layer, which a store has not compressed yet."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hyperattention.cache.buffer import is_writable
from hyperattention.cache.fitting import fit_new
from hyperattention.coreset import Coreset


class Recent:
    """Hold keys and values in the order in which they were appended, with free space at the end.

    Cost: O(1) copies per token, if old tokens are dropped many at a time.
    """

    def __init__(self) -> None:
        """Start empty."""
        self._buffer: tuple[Tensor, Tensor, Tensor] | None = None
        self.num = 0

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return keys, values, and a mask that is False for padding, as views.

        Returns:
            ``[batch, kv_heads, tokens, width]`` twice, and ``[batch, tokens]``.

        Raises:
            ValueError: if no key was ever appended.
        """
        if self._buffer is None:
            raise ValueError("the cache is empty: append keys and values first")
        k, v, live = self._buffer
        return k[:, :, : self.num], v[:, :, : self.num], live[:, : self.num]

    @property
    def coreset(self) -> Coreset:
        """Return a coreset of every key with weight 1, padding left out."""
        return self.first(self.num)

    def first(self, num: int) -> Coreset:
        """Return a coreset of the oldest tokens.

        Args:
            num: number of tokens.

        Returns:
            every key with weight 1, padding left out.
        """
        k, v, live = (x[..., :num] if x.ndim == 2 else x[:, :, :num] for x in self.tensors)
        weight = torch.zeros(live.shape, dtype=torch.promote_types(k.dtype, torch.float32), device=k.device)
        return Coreset(k, v, weight.masked_fill_(~live, -torch.inf)[:, None].expand(-1, k.shape[1], -1))

    @property
    def batch(self) -> int:
        """Rows of the batch; 0 if the buffer is empty."""
        return 0 if self._buffer is None else self._buffer[0].shape[0]

    @property
    def device(self) -> torch.device | None:
        """Device of keys and values; None if the buffer is empty."""
        return None if self._buffer is None else self._buffer[0].device

    @property
    def memory_bytes(self) -> int:
        """Bytes of the buffer, free space included."""
        return sum(x.numel() * x.element_size() for x in self._buffer or ())

    def append(
        self, k: Float[Tensor, "batch kv_heads new head_dim"], v: Float[Tensor, "batch kv_heads new value_dim"], most: int
    ) -> None:
        """Write tokens after the others.

        Args:
            k: keys.
            v: values.
            most: largest number of tokens for which space is allocated in advance.
        """
        if self._buffer is not None:
            fit_new((k, v), self._buffer[:2])
        live = torch.ones(k.shape[0], k.shape[2], dtype=torch.bool, device=k.device)
        end = self.num + k.shape[2]
        have = 0 if self._buffer is None else self._buffer[0].shape[2]
        if self._buffer is None or end > have or not is_writable(self._buffer[0]):
            self._move(0, max(end, min(most, 3 * have // 2)), like=(k, v, live))
        self.num = end
        for to, source in zip(self._latest(k.shape[2]), (k, v, live), strict=True):
            to.copy_(source)

    def mask_padding(self, live: Bool[Tensor, "batch new"]) -> None:
        """Mark the latest tokens that are padding.

        Args:
            live: False for padding.
        """
        if self._buffer is None or bool(live.all()):
            return
        k, v, held = self._latest(live.shape[1])
        held.copy_(live)
        # so that no previous content can reach a sum
        for x in (k, v):
            x.masked_fill_(~live[:, None, :, None], 0.0)

    def drop(self, num: int, most: int) -> None:
        """Remove the oldest tokens, and free their space.

        Args:
            num: number of tokens to remove.
            most: number of tokens for which space is kept.
        """
        self._move(num, max(self.num - num, most), like=self.tensors)

    def crop(self, num: int) -> None:
        """Remove the latest tokens.

        Args:
            num: number of tokens, at most as many as are held.
        """
        self.num -= num

    def take_rows(self, index: Int[Tensor, " rows"]) -> None:
        """Select rows of the batch.

        Args:
            index: the rows; repeats are allowed.
        """
        if self._buffer is not None:
            k, v, live = (x.index_select(0, index.to(x.device)) for x in self._buffer)
            self._buffer = (k, v, live)

    def restore(self, k: Tensor, v: Tensor, live: Tensor) -> None:
        """Replace the content.

        Args:
            k: keys.
            v: values.
            live: False for padding.
        """
        self._buffer, self.num = (k, v, live), k.shape[2]

    def _latest(self, num: int) -> tuple[Tensor, Tensor, Tensor]:
        k, v, live = self.tensors
        begin = self.num - num
        return k[:, :, begin:], v[:, :, begin:], live[:, begin:]

    def _move(self, begin: int, room: int, like: tuple[Tensor, ...]) -> None:
        """Copy the tokens from index `begin` on to the front of a new buffer."""
        k, v, live = like
        fresh = (
            k.new_empty((*k.shape[:2], room, k.shape[3])),
            v.new_empty((*v.shape[:2], room, v.shape[3])),
            live.new_empty((live.shape[0], room)),
        )
        kept = 0
        if self._buffer is not None:
            kept = self.num - begin
            for to, source in zip(fresh[:2], self.tensors[:2], strict=True):
                to[:, :, :kept] = source[:, :, begin:]
            fresh[2][:, :kept] = self.tensors[2][:, begin:]
        self._buffer, self.num = fresh, kept
