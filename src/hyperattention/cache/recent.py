"""The latest keys and values of a layer, as they are: what a store has not compressed yet."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hyperattention.cache.buffer import is_writable
from hyperattention.cache.fitting import fit_new
from hyperattention.coreset import Coreset


class Recent:
    """Hold keys and values in the order in which they came, with room for more at the end.

    Cost: O(1) copies a token, whenever old tokens are dropped many at a time.
    """

    def __init__(self) -> None:
        """Hold nothing."""
        self._buffer: tuple[Tensor, Tensor, Tensor] | None = None
        self.num = 0

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Show keys, values, and which of them are no padding, as views.

        Returns:
            ``[batch, kv_heads, tokens, width]`` twice, and ``[batch, tokens]``.

        Raises:
            ValueError: if nothing was ever held.
        """
        if self._buffer is None:
            raise ValueError("nothing is held yet: append keys and values first")
        k, v, live = self._buffer
        return k[:, :, : self.num], v[:, :, : self.num], live[:, : self.num]

    @property
    def coreset(self) -> Coreset:
        """Give what attention reads: every key as itself, none for padding."""
        return self.first(self.num)

    def first(self, num: int) -> Coreset:
        """Give what attention to the oldest tokens reads.

        Args:
            num: how many.

        Returns:
            every key as itself, none for padding.
        """
        k, v, live = (x[..., :num] if x.ndim == 2 else x[:, :, :num] for x in self.tensors)
        weight = torch.zeros(live.shape, dtype=torch.promote_types(k.dtype, torch.float32), device=k.device)
        return Coreset(k, v, weight.masked_fill_(~live, -torch.inf)[:, None].expand(-1, k.shape[1], -1))

    @property
    def batch(self) -> int:
        """Rows of the batch; 0 while nothing is held."""
        return 0 if self._buffer is None else self._buffer[0].shape[0]

    @property
    def device(self) -> torch.device | None:
        """Where they lie; None while nothing is held."""
        return None if self._buffer is None else self._buffer[0].device

    @property
    def memory_bytes(self) -> int:
        """Bytes of the buffer, room for more included."""
        return sum(x.numel() * x.element_size() for x in self._buffer or ())

    def append(
        self, k: Float[Tensor, "batch kv_heads new head_dim"], v: Float[Tensor, "batch kv_heads new value_dim"], most: int
    ) -> None:
        """Write tokens behind the others.

        Args:
            k: keys.
            v: values.
            most: tokens beyond which no room is made in advance.
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
        """Say which of the latest tokens are padding.

        Args:
            live: False for padding.
        """
        if self._buffer is None or bool(live.all()):
            return
        k, v, held = self._latest(live.shape[1])
        held.copy_(live)
        # so that nothing that stood there can reach a sum
        for x in (k, v):
            x.masked_fill_(~live[:, None, :, None], 0.0)

    def drop(self, num: int, most: int) -> None:
        """Forget the oldest tokens, and give back what room they had.

        Args:
            num: how many.
            most: tokens for which there will be room.
        """
        self._move(num, max(self.num - num, most), like=self.tensors)

    def crop(self, num: int) -> None:
        """Forget the latest tokens.

        Args:
            num: how many, not more than are held.
        """
        self.num -= num

    def take_rows(self, index: Int[Tensor, " rows"]) -> None:
        """Copy rows of the batch.

        Args:
            index: which, repeats allowed.
        """
        if self._buffer is not None:
            k, v, live = (x.index_select(0, index.to(x.device)) for x in self._buffer)
            self._buffer = (k, v, live)

    def restore(self, k: Tensor, v: Tensor, live: Tensor) -> None:
        """Hold just these.

        Args:
            k: keys.
            v: values.
            live: which are no padding.
        """
        self._buffer, self.num = (k, v, live), k.shape[2]

    def _latest(self, num: int) -> tuple[Tensor, Tensor, Tensor]:
        k, v, live = self.tensors
        begin = self.num - num
        return k[:, :, begin:], v[:, :, begin:], live[:, begin:]

    def _move(self, begin: int, room: int, like: tuple[Tensor, ...]) -> None:
        """Copy the tokens from `begin` on to the front of a new buffer."""
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
