"""A scheduler that cuts prompts at edges of tiles, so that batch and chunk size have no effect on what a method chooses."""

from typing import Any

import torch
from vllm.platforms import current_platform  # pyright: ignore[reportMissingImports]
from vllm.v1.core.sched.async_scheduler import AsyncScheduler  # pyright: ignore[reportMissingImports]
from vllm.v1.core.sched.scheduler import Scheduler  # pyright: ignore[reportMissingImports]

from hyperattention.integrations.vllm.choice import choose, read_plan
from hyperattention.integrations.vllm.options import read_options

# vLLM schedules asynchronously by default, but never on a CPU
_ASYNCHRONOUS = not current_platform.is_cpu()
_STOCK: Any = AsyncScheduler if _ASYNCHRONOUS else Scheduler


class AlignedScheduler(_STOCK):
    """vLLM's scheduler, with chunks of prompts that end at multiples of the method's tile, or at the prompt's end.

    The method chooses keys for tiles of consecutive positions, by all queries of a tile. vLLM ends a chunk where the budget
    of a step ends, which depends on the other requests; a tile that is cut there is chosen for in two parts, each by its own
    queries. With whole tiles, the choice is the same for every chunk size and batch. vLLM has this rule for models with
    Mamba layers; it is used here for the tile.
    """

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        if self.need_mamba_block_aligned_split:
            raise ValueError(
                "AlignedScheduler does not serve models with Mamba layers, whose prompts vLLM itself cuts at edges of "
                "blocks: start vLLM without --scheduler-cls"
            )
        if self.scheduler_config.async_scheduling != _ASYNCHRONOUS:
            raise ValueError(
                "AlignedScheduler schedules asynchronously except on a CPU: start vLLM with its default, without "
                "--no-async-scheduling"
            )
        options, model = read_options(self.vllm_config.additional_config), self.vllm_config.model_config
        device = torch.device(self.vllm_config.device_config.device_type)
        self.tile = choose(options, read_plan(options), max_length=model.max_model_len, device=device).tile
        least = self.tile + self.scheduler_config.max_num_seqs - 1
        if self.max_num_scheduled_tokens < least:
            raise ValueError(
                f"--max-num-batched-tokens {self.max_num_scheduled_tokens} may leave no room for a tile of {self.tile} "
                f"beside {self.scheduler_config.max_num_seqs} requests (--max-num-seqs): give at least {least}"
            )
        self.need_mamba_block_aligned_split = True

    def _mamba_block_aligned_split(
        self,
        request: Any,
        num_new_tokens: int,
        num_new_local_computed_tokens: int = 0,
        num_external_computed_tokens: int = 0,
    ) -> int:
        """Cut a chunk back to the last edge of a tile; 0 if it reaches none, which leaves the request for a later step."""
        start = request.num_computed_tokens + num_new_local_computed_tokens + num_external_computed_tokens
        end = start + num_new_tokens
        if end >= request.num_prompt_tokens:
            return num_new_tokens
        return max(0, end // self.tile * self.tile - start)
