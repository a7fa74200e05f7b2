"""The builder of a step's metadata: it reads the options once, checks the model, and splits the rows of each step."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hyperattention.integrations.vllm.choice import Choice, choose, read_plan
from hyperattention.integrations.vllm.metrics import served_metrics
from hyperattention.integrations.vllm.options import read_options
from hyperattention.integrations.vllm.plan_model import check_plan
from hyperattention.integrations.vllm.served_layers import check_layer
from hyperattention.integrations.vllm.split import Piece, Split, split_step
from hyperattention.integrations.vllm.step import Step
from hyperattention.integrations.vllm.stock import cache_pages, stock_backend
from hyperattention.methods.base import AttentionMethod

_STOCK_BUILDER: Any = stock_backend().get_builder_cls()


class HyperAttentionBuilder(_STOCK_BUILDER):
    """Prepare each step for a group of layers that share a kind of cache. vLLM makes it before the first request."""

    # a step is new for each batch, and holds more than a table of pages
    supports_update_block_table = False

    @classmethod
    def get_cudagraph_support(cls, *_: Any) -> Any:
        """Return that no graph is recorded: a graph would replay the rows of the step that it was recorded in."""
        from vllm.v1.attention.backend import AttentionCGSupport  # pyright: ignore[reportMissingImports]

        return AttentionCGSupport.NEVER

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        from vllm.config import get_layers_from_vllm_config  # pyright: ignore[reportMissingImports]
        from vllm.model_executor.layers.attention import Attention  # pyright: ignore[reportMissingImports]

        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        model = vllm_config.model_config
        self.options, self.metrics = read_options(vllm_config.additional_config), served_metrics()
        plan = read_plan(self.options)
        unread = None if plan is None else check_plan(plan, model.hf_config, model.model)
        self.choice = choose(self.options, plan, max_length=model.max_model_len, device=device)
        self.heads = _heads_here(model)
        served = get_layers_from_vllm_config(vllm_config, Attention, layer_names)
        self.layers = _choose_layers(served, self.choice, self.heads)
        # no kernel writes keys where nothing is read
        self.pages = cache_pages(kv_cache_spec, getattr(self, "isa", None)) if self.layers else None
        self.metrics.describe(self.choice, sorted(number for number, _ in self.layers.values()), unread)

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Step:
        """Prepare a step.

        Args:
            common_prefix_len: always 0.
            common_attn_metadata: the batch.
            fast_build: passed on.

        Returns:
            what the layers share.
        """
        common = common_attn_metadata
        whole = super().build(common_prefix_len, common, fast_build)
        self.metrics.say_sometimes()
        split = self._split(common)
        rest, rows = None, torch.zeros(0, dtype=torch.int64, device=common.query_start_loc.device)
        if split.approximate and split.exact:
            part, rows = _exact_part(common, split.exact)
            rest = super().build(0, part, fast_build)
        return Step(
            whole, rest, rows, split.approximate, common.block_table_tensor, self.layers, self.heads[0], split, self.pages,
            self.options, self.metrics,
        )  # fmt: skip

    def _split(self, common: Any) -> Split:
        starts = common.query_start_loc_cpu.tolist()
        lengths = common.seq_lens_cpu_upper_bound
        lengths = (common.seq_lens if lengths is None else lengths).tolist()
        prompt, least = common.is_prefilling, self.choice.min_length
        if prompt is None or least is None or not self.layers or common.causal is not True:
            prompt, least = [False] * (len(starts) - 1), 0
        else:
            prompt = prompt.tolist()
        return split_step(starts, lengths[: len(starts) - 1], prompt[: len(starts) - 1], least)


def _heads_here(model: Any) -> tuple[int, int]:
    """Return the first and the end of the kv heads of this process, among those of the model."""
    from vllm.distributed import (  # pyright: ignore[reportMissingImports]
        get_tensor_model_parallel_rank,
        get_tensor_model_parallel_world_size,
    )

    rank, size = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
    total = model.get_total_num_kv_heads()
    first = rank * total // size
    # with more processes than heads, several hold the same head
    return first, first + max(1, total // size)


def _choose_layers(served: dict[str, Any], choice: Choice, heads: tuple[int, int]) -> dict[str, tuple[int, AttentionMethod]]:
    """Find the layers that may be approximated, and check each; layers with a sliding window are left to vLLM."""
    from vllm.model_executor.models.utils import extract_layer_index  # pyright: ignore[reportMissingImports]

    found = {}
    for name, layer in served.items():
        number, traits = extract_layer_index(name), layer.impl.traits
        method = choice.of(number, heads)
        if method is not None and traits.sliding_window is None:
            check_layer(name, traits)
            found[name] = number, method
    return found


def _exact_part(common: Any, pieces: tuple[Piece, ...]) -> tuple[Any, Tensor]:
    """Describe a batch of the exact rows alone, for vLLM's own builder; and return these rows."""
    device = common.query_start_loc.device
    rows = torch.cat([torch.arange(p.first, p.first + p.count, dtype=torch.int64, device="cpu") for p in pieces])
    index = torch.tensor([p.request for p in pieces], dtype=torch.int64, device="cpu")
    counts = torch.tensor([0, *(p.count for p in pieces)], dtype=torch.int32, device="cpu")
    starts = counts.cumsum(0, dtype=torch.int32)
    lengths = torch.tensor([p.keys for p in pieces], dtype=torch.int32, device="cpu")
    there, here = rows.to(device), index.to(device)
    prefilling = common.is_prefilling
    part = replace(
        common,
        query_start_loc=starts.to(device),
        query_start_loc_cpu=starts,
        seq_lens=lengths.to(device),
        seq_lens_cpu_upper_bound=lengths,
        num_reqs=len(pieces),
        num_actual_tokens=len(rows),
        max_query_len=max(p.count for p in pieces),
        max_seq_len=max(p.keys for p in pieces),
        block_table_tensor=common.block_table_tensor[here],
        slot_mapping=common.slot_mapping[there],
        positions=None if common.positions is None else common.positions[there],
        is_prefilling=None if prefilling is None else prefilling[index.to(prefilling.device)],
        _num_computed_tokens_cache=None,
        _token_to_req_indices_cache=None,
    )
    return part, there
