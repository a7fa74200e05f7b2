"""Count what choosing keys costs a GPU, without one: launches and bytes of its operators, on the meta device.

python benchmarks/gpu/counts.py                    # the default method at 8k, 131k and 1M tokens
python benchmarks/gpu/counts.py 65536 --largest 20 # one length, and the operators that move most
python benchmarks/gpu/counts.py --lean             # the lean method
python benchmarks/gpu/counts.py --call             # a whole call, forward: the choice, attention to the lists, the merge
python benchmarks/gpu/counts.py --audit            # an audit of 64 rows: audit_counts.py
python benchmarks/gpu/counts.py --decode           # a decoding step of each store of a cache: decode_counts.py
"""

import argparse
import runpy
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hyperattention import attention, default_method, lean_method
from hyperattention.kernels.list.flat_form import flat_form_of
from hyperattention.kernels.list.reference import Lists
from hyperattention.methods.base import AttentionMethod
from hyperattention.problem import Problem
from hyperattention.select import alike, draw_alike, placed
from hyperattention.select.score import alike_fused, hierarchical_search, search_fused

HEADS, KV_HEADS, HEAD_DIM = SIZES = 32, 8, 128
# operators of several launches, and one that only compares types
LAUNCHES = {"key_factors": 2, "promote_types": 0}
# operators that ask a tensor only where it is, and those that read its first rows only, as many as an argument says
ASKED, LEADING = {"place_tiles"}, {"alike_first": 2, "key_basis": 1}


class Count(TorchDispatchMode):
    """Operators that launch a kernel, and the bytes that they read and write; a tensor counts as often as it is stored."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        # a view moves nothing, and memory is not touched by asking for it
        if not func.is_view and "empty" not in func.name() and "_unsafe_view" not in func.name():
            name = func.overloadpacket._qualified_op_name.split("::")[1]
            if name in ASKED:
                args = args[1:]
            if name in LEADING:
                args = tuple(
                    x[:, : args[LEADING[name]]].clone() if isinstance(x, Tensor) and x.ndim == 3 else x for x in args
                )
            tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, Tensor)]
            self.launches[name] += launches_of_lists(*args) if name == "list_attention" else LAUNCHES.get(name, 1)
            self.bytes[name] += sum(min(x.numel() * x.element_size(), x.untyped_storage().nbytes()) for x in tensors)
        return result


def launches_of_lists(q, k, v, *fields) -> int:
    """Count the launches of the fast list kernel: of itself, and of what lays lists out that it cannot read as they lie."""
    *of_lists, table, _ = fields
    form = flat_form_of(Lists(*of_lists), k.shape[1], paged=table is not None)
    assert form is not None, "the general form reads these lists"
    return 1 + form.to_lay_out


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Let the choice take the path of a GPU: the fused kernels, of which tensors without memory need only the shapes."""
    with ExitStack() as stack:
        for module in (hierarchical_search, draw_alike, placed, alike):
            stack.enter_context(patch.object(module, "triton_reads", lambda *tensors: True))
        for module in (search_fused, alike_fused):
            stack.enter_context(patch.object(module, "dtype_of_estimates", lambda device: torch.bfloat16))
        yield


def count(tokens: int, lean: bool = False) -> Count:
    return count_launches(method_of(lean), tokens)


def method_of(lean: bool) -> AttentionMethod:
    return lean_method(65_536) if lean else default_method(65_536)


def count_call(method: AttentionMethod, tokens: int) -> Count:
    """Count what a call takes, forward, without gradients."""
    q, k = (torch.empty(1, heads, tokens, HEAD_DIM, dtype=torch.bfloat16, device="meta") for heads in (HEADS, KV_HEADS))
    with as_on_a_gpu(), torch.no_grad(), Count() as counted:
        attention(q, k, k, is_causal=True, enable_gqa=True, method=method)
    return counted


def count_launches(method: AttentionMethod, tokens: int, sizes: tuple[int, int, int] = SIZES) -> Count:
    """Count what a choice takes, for so many heads, kv heads and numbers of a query."""
    *heads, width = sizes
    q, k = (torch.empty(1, number, tokens, width, dtype=torch.bfloat16, device="meta") for number in heads)
    with as_on_a_gpu(), torch.no_grad(), Count() as counted:
        method.selections(Problem(q, k, k, width**-0.5, causal=True))
    return counted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tokens", type=int, nargs="*", default=[8192, 131_072, 1_048_576])
    parser.add_argument("--largest", type=int, default=0, help="operators to name, by bytes")
    parser.add_argument("--lean", action="store_true", help="count what the lean method takes below 131,072 keys")
    parser.add_argument("--call", action="store_true", help="count a whole call, not its choice alone")
    parser.add_argument("--audit", action="store_true", help="count an audit of 64 rows")
    parser.add_argument("--decode", action="store_true", help="count a decoding step of each store of a cache")
    options = parser.parse_args()
    if options.audit or options.decode:
        script = "audit_counts.py" if options.audit else "decode_counts.py"
        runpy.run_path(str(Path(__file__).parent / script), run_name="__main__")
        return
    for tokens in options.tokens:
        counted = count_call(method_of(options.lean), tokens) if options.call else count(tokens, options.lean)
        print(f"{tokens:,} tokens: {counted.launches.total()} launches, {counted.bytes.total() / 1e9:.3g} GB")
        for name, moved in counted.bytes.most_common(options.largest):
            print(f"    {name}: {counted.launches[name]} launches, {moved / 1e9:.3g} GB")


if __name__ == "__main__":
    main()
