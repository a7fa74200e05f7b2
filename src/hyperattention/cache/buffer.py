"""Buffers of keys and values that are written in place as the text grows."""

import torch
from torch import Tensor


def is_writable(x: Tensor) -> bool:
    """Return whether a buffer can be written in place: a buffer from inference mode can be written only in inference mode.

    Args:
        x: the buffer.

    Returns:
        whether it can; if not, copy it first.
    """
    return torch.is_inference_mode_enabled() or not x.is_inference()


def grown(old: Tensor | None, new: Tensor, count: int) -> Tensor:
    """Write new rows after the first `count`, in a buffer that grows by halves: O(1) copies per row.

    Args:
        old: the buffer; None for none.
        new: rows ``[batch, heads, new, width]``.
        count: rows of the buffer that are in use.

    Returns:
        the buffer, or a longer one.
    """
    end = count + new.shape[2]
    if old is None:
        return new.clone(memory_format=torch.contiguous_format)
    if end > old.shape[2] or not is_writable(old):
        old = torch.cat(
            [old[:, :, :count], old.new_empty((*old.shape[:2], max(end, 3 * count // 2) - count, old.shape[3]))], 2
        )
    old[:, :, count:end] = new
    return old
