"""FlexAttention with sinks and a window: torch's own sparse kernel, at the slots of the method judged."""

import torch
from torch import Tensor

from gpu.candidates import Candidate, Entry, Failure, bind, sinks_and_slots
from gpu.session import Session, reason_of
from gpu.tasks import Task

_BLOCK = 128


def flex_candidate(session: Session, task: Task) -> Entry:
    """Spend all slots on sinks and a window of certain keys; refused where the length is no multiple of its blocks."""
    sinks, slots = sinks_and_slots(session.plan.method)
    window = slots - sinks
    label = "FlexAttention: sinks + window"
    try:
        attend = _attend(task, sinks, window, compiled=session.device.type == "cuda")
    except Exception as error:
        return Failure("flex", label, reason_of(error))
    written = f"flex_attention(sinks={sinks}, window={window})"
    return Candidate("flex", label, bind(attend, task.tensors), written, float(slots), slots / task.exact_pairs, attend)


def _attend(task: Task, sinks: int, window: int, *, compiled: bool):
    # here, because a torch without it must still measure all else
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    if task.keys % _BLOCK or not task.causal:
        raise ValueError(f"{task.keys} keys, causal={task.causal}: the mask is written for causal multiples of {_BLOCK}")

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & ((query - key < window) | (key < sinks))

    partial, full = _blocks(task.keys // _BLOCK, sinks, window, task.tensors.q.device)
    mask = BlockMask.from_kv_blocks(*_ordered(partial), *_ordered(full), BLOCK_SIZE=_BLOCK, mask_mod=visible)
    run = torch.compile(flex_attention, dynamic=False) if compiled else flex_attention

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = run(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])
        if not isinstance(out, Tensor):
            raise TypeError("flex_attention was asked for its output alone and returned more")
        return out

    return attend


def _blocks(count: int, sinks: int, window: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return which blocks of keys a block of queries sees in part, and which in full.

    Torch's own create_block_mask looks at every pair, which at 131,072 tokens are 17 billion.
    """
    query, key = torch.arange(count, device=device)[:, None], torch.arange(count, device=device)[None]
    first_seen = (query * _BLOCK - window + 1).clamp(min=0) // _BLOCK
    seen = (key <= query) & ((key >= first_seen) | (key * _BLOCK < sinks))
    full = (key < query) & (key * _BLOCK > query * _BLOCK + _BLOCK - 1 - window)
    return seen & ~full, full


def _ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Give the number of blocks in each row, and their indices first in it."""
    order = blocks.int().argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32)[None, None], order.int()[None, None]
