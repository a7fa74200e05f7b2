"""Which of the two Triton list kernels reads a selection, decided in this file alone."""

from torch import Tensor

from hyperattention.kernels.list import triton_forward
from hyperattention.kernels.list.flat_form import FlatForm, flat_form_of
from hyperattention.kernels.list.reference import Lists
from hyperattention.kernels.list.triton_flat import flat_forward, flat_shape_of


def forward(
    q: Tensor, k: Tensor, v: Tensor, lists: Lists, scale: float, table: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attend from every tile to the keys on its list: `list_torch.forward` on a GPU.

    Args:
        q: queries by tile, ``[lists, tiles, group, size, head_dim]``.
        k: keys, ``[key_rows, keys, head_dim]``, or pages of them, ``[pages, kv_heads, page_size, head_dim]``.
        v: values, laid out as the keys.
        lists: the selection.
        scale: factor of the scores.
        table: pages of each sequence, ``[sequences, pages]``, if keys lie in pages.

    Returns:
        out ``[lists, tiles, group, size, value_dim]`` in the dtype of `q`, and lse, without its last axis, in float32; both
        lie head after head.
    """
    form = flat_form_for(q, k, v, lists, table)
    if form is None:
        return triton_forward.forward(q, k, v, lists, scale, table)
    return flat_forward(q, k, v, form, scale)


def flat_form_for(q: Tensor, k: Tensor, v: Tensor, lists: Lists, table: Tensor | None = None) -> FlatForm | None:
    """Lay a selection out for the fast kernel, if that kernel reads it and has work for the whole device.

    Args:
        q: queries by tile.
        k: keys, or pages of them.
        v: values, laid out as the keys.
        lists: the selection.
        table: pages of each sequence.

    Returns:
        the layout; None where the general kernel runs: where `flat_form_of` gives none, where there is nothing to read, and
        where tiles are so few that their lists have to be split.
    """
    if not (q.numel() and k.numel() and v.numel() and lists.num_slots):
        return None
    cut = flat_shape_of(
        q.shape[2] * q.shape[3], triton_forward.widest(q, v), q.element_size(), triton_forward.capability_of(q)
    )
    if triton_forward.splits_of(q, lists, cut) > 1:
        return None
    return flat_form_of(lists, k.shape[1], paged=table is not None)
