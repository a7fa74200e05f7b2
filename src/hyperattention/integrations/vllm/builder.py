"""The builder of a step's metadata: it reads the options once, checks the model, and splits the rows of each step."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from vllm.config import get_layers_from_vllm_config  # pyright: ignore[reportMissingImports]
from vllm.model_executor.layers.attention import Attention  # pyright: ignore[reportMissingImports]
from vllm.model_executor.models.utils import extract_layer_index  # pyright: ignore[reportMissingImports]

from hyperattention.integrations.vllm.choice import Choice, choose, read_plan, unreached
from hyperattention.integrations.vllm.decoding import decoded_rows
from hyperattention.integrations.vllm.metrics import served_metrics
from hyperattention.integrations.vllm.options import Options, read_options
from hyperattention.integrations.vllm.page_summaries import PageSummaries, filled_pages
from hyperattention.integrations.vllm.plan_model import check_plan
from hyperattention.integrations.vllm.served_layers import check_layer, check_listed
from hyperattention.integrations.vllm.side_tables import EngineTraits, TableShape, check_engine, check_memory
from hyperattention.integrations.vllm.split import Piece, Split, split_step
from hyperattention.integrations.vllm.step import NOT_SERVED, ExactRows, ServedLayer, Step
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
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        model = vllm_config.model_config
        self.options, self.metrics = read_options(vllm_config.additional_config), served_metrics()
        check_listed(self.options.layers, model.get_total_num_hidden_layers())
        plan = read_plan(self.options)
        unread = None if plan is None else check_plan(plan, model.hf_config, model.model)
        self.choice = choose(self.options, plan, max_length=model.max_model_len, device=device)
        self.heads = _heads_here(model)
        self.block_size = kv_cache_spec.block_size
        served = get_layers_from_vllm_config(vllm_config, Attention, layer_names)
        methods = _choose_methods(served, self.choice, self.heads)
        tables, decoding = _make_tables(served, self.options, vllm_config, kv_cache_spec, device)
        self.layers = {
            name: ServedLayer(extract_layer_index(name), methods.get(name), tables.get(name))
            for name in served
            if name in methods or name in tables
        }
        # no kernel writes keys where nothing is read
        self.pages = cache_pages(kv_cache_spec, getattr(self, "isa", None)) if self.layers else None
        numbers = sorted(extract_layer_index(name) for name in methods)
        short = unreached(self.choice, self.options, model.max_model_len)
        self.metrics.describe(self.choice, numbers, unread, decoding=decoding, unreached=short)

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Step:
        """Prepare a step.

        Args:
            common_prefix_len: always 0.
            common_attn_metadata: the batch.
            fast_build: passed on.

        Returns:
            what the layers share.
        """
        common, device = common_attn_metadata, common_attn_metadata.query_start_loc.device
        whole = ExactRows(super().build(common_prefix_len, common, fast_build), None)
        self.metrics.say_sometimes()
        split, exact = self._split(common, (True, True)), {NOT_SERVED.kind: whole}
        for kind in {layer.kind for layer in self.layers.values()}:
            own = split if kind == (True, True) else self._split(common, kind)
            if not own.approximate and not own.selected:
                exact[kind] = whole
            elif own.exact:
                part, rows = _exact_part(common, own.exact)
                exact[kind] = ExactRows(super().build(0, part, fast_build), rows)
            else:
                exact[kind] = ExactRows(None, torch.zeros(0, dtype=torch.int64, device=device))
        table, options = common.block_table_tensor, self.options.decode
        rows, filled = (), None
        if self.decodes and options is not None:
            rows = decoded_rows(split.selected, table, self.block_size, options)
            filled = filled_pages(common.slot_mapping, options.policy.page)
        short = "prompts" if self.choice.min_length is None else "below min_length"
        return Step(
            exact, split, rows, filled, table, self.layers, self.heads[0], short, self.pages, self.options, self.metrics
        )

    def _split(self, common: Any, kind: tuple[bool, bool]) -> Split:
        """Split the rows of a layer by whether its prompts, and its requests that generate may be approximated."""
        starts = common.query_start_loc_cpu.tolist()
        lengths = common.seq_lens_cpu_upper_bound
        lengths = (common.seq_lens if lengths is None else lengths).tolist()
        prompt, least, decode_from = common.is_prefilling, None, None
        if prompt is None or common.causal is not True:
            prompt = [False] * (len(starts) - 1)
        else:
            prompt, least = prompt.tolist(), self.choice.min_length if kind[0] else None
            decode_from = self.options.decode.least if kind[1] and self.decodes and self.options.decode else None
        return split_step(starts, lengths[: len(starts) - 1], prompt[: len(starts) - 1], least, decode_from)

    @property
    def decodes(self) -> bool:
        """Whether a layer of this group has a side table."""
        return any(layer.summaries is not None for layer in self.layers.values())


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


def _choose_methods(served: dict[str, Any], choice: Choice, heads: tuple[int, int]) -> dict[str, AttentionMethod]:
    """Find the layers whose prompts may be approximated, and check each; sliding windows are left to vLLM."""
    found = {}
    for name, layer in served.items():
        traits, method = layer.impl.traits, choice.of(extract_layer_index(name), heads)
        if method is not None and traits.sliding_window is None:
            check_layer(name, traits)
            found[name] = method
    return found


def _make_tables(
    served: dict[str, Any], options: Options, config: Any, spec: Any, device: torch.device
) -> tuple[dict[str, PageSummaries], str]:
    """Make the side tables of the layers that decode by their best pages; and say how tokens are generated."""
    asked, blocks = options.decode, config.cache_config.num_gpu_blocks
    # while vLLM measures memory there is no cache yet
    if asked is None or blocks is None:
        return {}, "decoding is exact"
    engine = EngineTraits(
        speculative=config.speculative_config is not None,
        transfers=config.kv_transfer_config is not None,
        overlaps=config.parallel_config.use_ubatching,
        block_size=config.cache_config.block_size,
        kernel_block_size=spec.block_size,
        blocks=blocks,
    )
    # the layers of other groups count for the memory
    every = _decoding_shapes(get_layers_from_vllm_config(config, Attention), options, spec.dtype)
    shapes = {name: every[name] for name in served if name in every}
    if not shapes:
        return {}, "decoding is exact"
    check_engine(engine, asked)
    taken = check_memory(list(every.values()), engine, asked)
    numbers = sorted(extract_layer_index(name) for name in shapes)
    text = (
        f"requests that generate read {asked.budget.budget} keys from {asked.least} keys on, in layers {numbers} by "
        f"{asked.policy!r}; the summaries of pages take {taken / 2**20:.1f} MiB beside the memory of vLLM"
    )
    return {name: shape.allocate(engine, asked, device) for name, shape in shapes.items()}, text


def _decoding_shapes(served: dict[str, Any], options: Options, dtype: torch.dtype) -> dict[str, TableShape]:
    """Find the layers that decode by their best pages, and check each; sliding windows are left to vLLM."""
    found = {}
    for name, layer in served.items():
        traits = layer.impl.traits
        listed = options.layers is None or extract_layer_index(name) in options.layers
        if listed and traits.sliding_window is None:
            check_layer(name, traits, selects=True)
            found[name] = TableShape(layer.num_kv_heads, layer.head_size, dtype)
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
