"""Count the launches of a decoding step, a layer, without a GPU: those of each store of a cache, with and without kernels.

python benchmarks/gpu/decode_counts.py      # or: python benchmarks/gpu/counts.py --decode

A step is `append`, attention, and `end_step`. What a step takes most often is counted, on small tensors of a CPU: every
operator that is no view is a launch on a GPU, and an operator of our own counts as the launches that it makes if its lists
are split. Steps in which a store compresses, or summarises a page that is full, take more; they are listed by the largest
count of all steps.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hyperattention import coreset
from hyperattention.cache import selecting
from hyperattention.cache.budget import CacheBudget
from hyperattention.cache.compressing import CompressingStore
from hyperattention.cache.store import Store
from hyperattention.kernels.decode.page_plan import PagePlan
from hyperattention.policies.cluster_means import ClusterMeans
from hyperattention.policies.heavy_hitters import HeavyHitters
from hyperattention.policies.latest import Latest
from hyperattention.policies.top_pages import TopPages
from hyperattention.policies.uniform_sample import UniformSample

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 16
ROOM = CacheBudget(128, sinks=16, window=32)
PROMPT, STEPS = 256, 24
# launches of each operator of ours (tests/test_triton_decode.py counts them)
LAUNCHES = {"decode_coreset": 2, "decode_best_pages": 2, "decode_pages": 2}
# bookkeeping of dtypes, and views that torch does not mark as such
FREE = ("promote_types", "empty", "_unsafe_view")


@dataclass(frozen=True)
class StepCount:
    """Launches of a step.

    Args:
        usual: those of most steps, by operator.
        most: the largest number of any step.
    """

    usual: Counter[str]
    most: int


class Launches(TorchDispatchMode):
    """Counts launches, and gives zeros in place of what a GPU would compute."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket._qualified_op_name.split("::")[1]
        if name in LAUNCHES:
            self.counts[name] += LAUNCHES[name]
            return results_of(name, args)
        if not func.is_view and not any(word in name for word in FREE):
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


def results_of(name: str, args: tuple) -> tuple[Tensor, ...]:
    q, k, v = args[:3]
    rows = torch.zeros(*q.shape[:3], v.shape[3]), torch.zeros(q.shape[:3])
    if name != "decode_best_pages":
        return rows
    return *rows, torch.zeros(k.shape[0] * k.shape[1], q.shape[2], PagePlan(*args[6]).num, dtype=torch.int32)


def pages(lender: bool = False) -> Store:
    policy = TopPages(share=2, first=0)
    above = policy.store(ROOM, 0, 0, None)
    # what the layer above has chosen
    above.chosen, above._complete = torch.full((KV_HEADS, 1, above.num_pages), 2), True
    return policy.store(ROOM, 1, 0, above) if lender else TopPages().store(ROOM, 0, 0, None)


def stores() -> dict[str, Store]:
    return {
        "cluster means": CompressingStore(ClusterMeans(), ROOM),
        "uniform sample": CompressingStore(UniformSample(), ROOM),
        "latest keys": CompressingStore(Latest(), ROOM),
        "heavy hitters": CompressingStore(HeavyHitters(), ROOM),
        "best pages": pages(),
        "pages of the layer above": pages(lender=True),
    }


@contextmanager
def kernels(there: bool) -> Iterator[None]:
    """Let stores take the path of a GPU."""
    with ExitStack() as stack:
        for module in (coreset, selecting):
            stack.enter_context(patch.object(module, "decodes_fused", lambda *tensors: there))
        yield


def count(store: Store, *, fused: bool) -> StepCount:
    generator = torch.Generator().manual_seed(0)

    def normal(heads: int, tokens: int) -> Tensor:
        return torch.randn(1, heads, tokens, HEAD_DIM, generator=generator)

    found = []
    with torch.inference_mode():
        prompt = normal(KV_HEADS, PROMPT)
        store.append(prompt, prompt)
        store.end_step(normal(HEADS, PROMPT), 0.25)
        for _ in range(STEPS):
            key, query = normal(KV_HEADS, 1), normal(HEADS, 1)
            with kernels(fused), Launches() as counted:
                store.append(key, key)
                store.attend(query, 0.25)
                store.end_step(query, 0.25)
            found.append(counted.counts)
    totals = [each.total() for each in found]
    usual = Counter(totals).most_common(1)[0][0]
    return StepCount(found[totals.index(usual)], max(totals))


def main() -> None:
    print("transformers' own cache: 3 launches (two concatenations of all keys and values, and attention)")
    plain = {name: count(store, fused=False) for name, store in stores().items()}
    for name, store in stores().items():
        counted = count(store, fused=True)
        own = sum(counted.usual[each] for each in LAUNCHES)
        print(
            f"{name}: {counted.usual.total()} launches, {own} of them attention; at most {counted.most} in a step; in "
            f"PyTorch's operators alone {plain[name].usual.total()}"
        )


if __name__ == "__main__":
    main()
