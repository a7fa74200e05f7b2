"""Attention over a sequence whose tokens several ranks hold: context parallelism that moves drawn keys, not all keys."""

from hyperattention.distributed.attention import attention, measured_attention
from hyperattention.distributed.errors import ExchangeError
from hyperattention.distributed.order import Contiguous, HeadTail, Order
from hyperattention.distributed.traffic import DistributedResult, Traffic
from hyperattention.methods.pooled_chunks import PooledChunks

__all__ = [
    "Contiguous",
    "DistributedResult",
    "ExchangeError",
    "HeadTail",
    "Order",
    "PooledChunks",
    "Traffic",
    "attention",
    "measured_attention",
]
