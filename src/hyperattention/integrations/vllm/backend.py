"""The attention backend: vLLM's own backend for exact rows and the cache, and a method for the other rows."""

from typing import Any

from torch import Tensor

from hyperattention.integrations.vllm.builder import HyperAttentionBuilder
from hyperattention.integrations.vllm.options import read_options
from hyperattention.integrations.vllm.served_layers import LayerTraits
from hyperattention.integrations.vllm.step import NOT_SERVED, Step, attend, decode
from hyperattention.integrations.vllm.stock import stock_backend

_STOCK: Any = stock_backend()
_STOCK_IMPLEMENTATION: Any = _STOCK.get_impl_cls()


class HyperAttentionImplementation(_STOCK_IMPLEMENTATION):
    """The attention of one layer. vLLM makes it, and its arguments are vLLM's."""

    supports_dcp, supports_pcp = False, False

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        alibi_slopes: list[float] | None,
        sliding_window: int | None,
        kv_cache_dtype: str,
        logits_soft_cap: float | None = None,
        attn_type: str = "decoder",
        kv_sharing_target_layer_name: str | None = None,
        sinks: Tensor | None = None,
        **other: Any,
    ) -> None:
        from vllm.config import get_current_vllm_config  # pyright: ignore[reportMissingImports]
        from vllm.utils.torch_utils import is_quantized_kv_cache  # pyright: ignore[reportMissingImports]

        # wrong options are refused before weights are read and the model is compiled
        read_options(get_current_vllm_config().additional_config)
        super().__init__(
            num_heads, head_size, scale, num_kv_heads, alibi_slopes, sliding_window, kv_cache_dtype, logits_soft_cap,
            attn_type, kv_sharing_target_layer_name, sinks=sinks, **other,
        )  # fmt: skip
        self.traits = LayerTraits(
            str(getattr(attn_type, "value", attn_type)), sliding_window, bool(logits_soft_cap), alibi_slopes is not None,
            sinks is not None, kv_cache_dtype, is_quantized_kv_cache(kv_cache_dtype), kv_sharing_target_layer_name,
        )  # fmt: skip

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Step | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Compute a layer's attention in one step; the keys of the step are in the cache already."""
        scales = (output_scale, output_block_scale)
        run = super().forward
        if attn_metadata is None:
            return run(layer, query, key, value, kv_cache, None, output, *scales)
        step = attn_metadata
        served = step.layers.get(layer.layer_name, NOT_SERVED)
        step.count(served, self.traits.sliding_window is not None)
        if served.summaries is not None and step.filled is not None and step.pages is not None:
            served.summaries.renew(step.pages.views(kv_cache)[0], step.filled)
        exact = step.exact[served.kind]
        rows = exact.rows
        if rows is None:
            return run(layer, query, key, value, kv_cache, exact.metadata, output, *scales)
        if exact.metadata is not None:
            part = output.new_empty((len(rows), *output.shape[1:]))
            output[rows] = run(layer, query[rows], key[rows], value[rows], kv_cache, exact.metadata, part, *scales)
        if served.method is not None:
            attend(step, served.number, served.method, query, kv_cache, output, self.scale)
        if served.summaries is not None:
            decode(step, served.summaries, query, kv_cache, output, self.scale)
        return output


class HyperAttentionBackend(_STOCK):
    """The class that vLLM looks up; all it does not name here is that of vLLM's own backend."""

    @staticmethod
    def get_name() -> str:
        """Return the name of the slot in which vLLM holds the backend."""
        return "CPU_ATTN" if _STOCK.get_name() == "CPU_ATTN" else "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[HyperAttentionImplementation]:
        """Return the class of a layer's attention."""
        return HyperAttentionImplementation

    @staticmethod
    def get_builder_cls() -> type[HyperAttentionBuilder]:
        """Return the class that prepares each step."""
        return HyperAttentionBuilder

    @classmethod
    def supports_non_causal(cls) -> bool:
        """Return that queries see no later keys."""
        return False
