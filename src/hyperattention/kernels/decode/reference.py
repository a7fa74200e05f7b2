"""A decoding step over the best pages in PyTorch: the specification of the Triton kernels, and the path of a CPU."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hyperattention.kernels import coreset as coreset_torch
from hyperattention.kernels.decode.page_plan import PagePlan


def best_pages(
    score: Float[Tensor, "batch kv_heads group queries pages"], begin: Int[Tensor, " batch"], plan: PagePlan
) -> Int[Tensor, "lists queries num"]:
    """Choose the pages of the best scores, the largest over the heads of a group after each head's softmax.

    Args:
        score: scores of all pages; -inf for a page that is excluded.
        begin: first key of each row; pages within sinks and padding are not chosen.
        plan: what is read.

    Returns:
        the pages in ascending order, after -1 for every page that is missing.
    """
    pages = score.shape[4]
    score = torch.log_softmax(score, -1).amax(2)  # [batch, kv_heads, queries, pages]
    bar = (begin + plan.sinks)[:, None, None, None]
    last = torch.arange(plan.page, (pages + 1) * plan.page, plan.page, dtype=torch.int64, device=score.device)
    best, index = score.masked_fill_(last <= bar, -torch.inf).topk(min(plan.num, pages), -1)
    index = index.masked_fill_(best == -torch.inf, -1).sort(-1).values.flatten(0, 1)
    if pages >= plan.num:
        return index
    return torch.nn.functional.pad(index, (plan.num - pages, 0), value=-1)
