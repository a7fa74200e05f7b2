"""What users write, for strict type checkers: `test_types.py` runs pyright over it, and nobody runs it."""

from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

import hyperattention as ha
from hyperattention import select
from hyperattention.calibration.calibrate import calibrate
from hyperattention.calibration.settings import CalibrationSettings
from hyperattention.integrations.transformers import HyperCache, register, use
from hyperattention.integrations.transformers.cache_file import load_cache, save_cache
from hyperattention.reference.model import load_reference
from hyperattention.reference.samples import samples_of_text
from hyperattention.synthetic import structured


def five_lines() -> torch.Size:
    inputs = structured(8192)
    out = ha.attention(inputs.q, inputs.k, inputs.v, is_causal=True)
    return out.shape


def measured(q: Tensor, k: Tensor, v: Tensor) -> list[float]:
    result = ha.measured_attention(q, k, v, is_causal=True, tolerance=0.1, audit=64, standard_error=True)
    numbers = [result.out.sum().item(), result.lse.max().item()]
    if result.standard_error is not None:
        numbers.append(result.standard_error.square().mean().item())
    if result.audit is not None:
        low, high = result.audit.interval
        numbers += [low.min().item(), high.max().item(), result.audit.relative_error.mean().item(), result.audit.num_rows]
    if result.tolerance is not None:
        numbers += [result.tolerance.bound.max().item(), result.tolerance.share_of_pairs, *result.tolerance.exact_heads]
        numbers += [method.cost(8192).pairs for method in result.tolerance.methods]
    report = ha.audit(q, k, v, result.out, is_causal=True, rows=64)
    return [*numbers, report.percentile_95_bound.max().item()]


def sequences(q: Tensor, k: Tensor, v: Tensor, edges: Tensor) -> Tensor:
    packed = ha.measured_varlen_attention(q, k, v, edges, is_causal=True, audit=64)
    errors = [report.relative_error for report in packed.audit if report is not None]
    return ha.varlen_attention(q, k, v, edges, is_causal=True) + packed.out * torch.stack(errors).mean()


def pages(q: Tensor, pages: tuple[Tensor, Tensor], table: Tensor, starts: Tensor, lengths: Tensor) -> Tensor:
    result = ha.measured_paged_attention(q, *pages, table, starts, lengths, tolerance=0.1)
    bounds = [report.bound for report in result.tolerance]
    return ha.paged_attention(q, *pages, table, starts, lengths, method=ha.default_method(8192)) * torch.stack(bounds).mean()


def own_method() -> float:
    by = select.Mix((ha.HierarchicalSearch(pooled=32), 0.7), (ha.Uniform(), 0.3))
    blocks = ha.TopBlocks(2, block_size=32, by=select.KeyBounds())
    method = ha.Method(ha.Sinks(16), ha.Window(128), blocks, ha.Draw(256, by=by), tile=64)
    mixed = ha.ByHead((method, ha.Exact(), ha.HyperAttention(), ha.lean_method(10**6)))
    return mixed.cost(32768).pairs + ha.Ladder((method,)).rungs[0].cost(1000).pairs


def model_under_a_method(model: PreTrainedModel, tokens: Tensor, plan: Path) -> str:
    with torch.inference_mode(), use(model, ha.load_plan(plan), layers=range(1, 4)) as calls:
        model(tokens, use_cache=False)
    register()
    return f"{calls}: {calls.counts.share_approximated}"


def model_with_a_cache(model: PreTrainedModel, tokens: Tensor, path: Path) -> str:
    cache = HyperCache(model.config, budget=1024, audit=16)
    with use(model, ha.Exact()):
        model(tokens, past_key_values=cache)
    save_cache(cache, model, path, tokens=tokens, overwrite=True)
    again, text = load_cache(path, model)
    return (
        f"{again.policy}, {again.room.budget}, {again.report}, {again.memory_bytes}, {0 if text is None else text.numel()}"
    )


def own_plan(text: str, folder: Path) -> ha.Plan:
    judged = load_reference()
    plan = calibrate(
        judged, samples_of_text(text, judged, 2048, 4), CalibrationSettings(tolerance=0.05), folder / "journal.jsonl"
    )
    ha.save_plan(plan, folder / "plan.json", overwrite=True)
    return ha.load_plan(folder / "plan.json")
