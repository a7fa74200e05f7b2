"""Make the plan for a number of pairs that docs/models.md tells of: `hyperattention calibrate --pairs`, shortened.

    python benchmarks/real/plan_by_pairs.py --pairs 500 --out build/plan.json    # half an hour on a busy machine; resumes

`calibrate` would run one pass over 8,192 tokens for each of 90 kv heads. Here the weights of heads are measured at 2,048
tokens, each pass begins at the stored input of the layer that changes, and the three heads of a layer are one batch. Squared
errors are measured at 8,192 tokens, on fewer parts and with fewer candidates. The plan is not timed: its crossover is None,
so that `use(model, plan)` runs exact attention, and `use(model, plan.method)` the plan.
"""

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from model import FOLDER, prepare
from texts import calibration_text
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from hyperattention.bench.rows import Row
from hyperattention.calibration.allocate import allocate
from hyperattention.calibration.conditions import describe
from hyperattention.calibration.damage import Weights
from hyperattention.calibration.journal import Journal
from hyperattention.calibration.sample import sample_layer
from hyperattention.calibration.settings import CalibrationSettings
from hyperattention.files.fingerprint import fingerprint
from hyperattention.files.method_table import method_to_json
from hyperattention.files.plan import Measured, Plan
from hyperattention.files.plan_file import save_plan
from hyperattention.methods.base import AttentionMethod
from hyperattention.methods.by_layer import ByLayer
from hyperattention.methods.exact import Exact
from hyperattention.methods.method import Method
from hyperattention.problem import Problem
from hyperattention.reference.call_recorder import CallInputs
from hyperattention.reference.model import LoadedModel, load_model
from hyperattention.reference.passes import Pass, run_pass
from hyperattention.reference.samples import EvaluationSample, samples_of_text
from hyperattention.select.draw_alike import DrawAlike
from hyperattention.select.locate.sinks import Sinks
from hyperattention.select.locate.window import Window

SINKS, WINDOW = Sinks(16), Window(64)
LADDER: tuple[AttentionMethod, ...] = (
    Exact(),
    Method(SINKS, WINDOW),
    Method(SINKS, Window(256)),
    *(Method(SINKS, WINDOW, DrawAlike(num)) for num in (64, 192)),
    *(Method(SINKS, WINDOW, DrawAlike(num, rows=16)) for num in (64, 128, 224, 352, 544, 832, 1280)),
)
# what stands in for exact attention where weights are measured
PROBE = Method(SINKS, WINDOW, DrawAlike(128))
# parts of 256 queries on which squared errors are measured
NUM_PARTS = 5


@dataclass(frozen=True)
class Layers:
    """The layers of a Llama over one text, run one after another with attention of one's own."""

    loaded: LoadedModel
    tokens: Tensor

    @property
    def inner(self):
        return self.loaded.model.model

    def calls(self, layer: int, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of a layer, with positions applied."""
        whole, normed = self.inner.layers[layer].self_attn, self.inner.layers[layer].input_layernorm(x)
        positions = self.inner.rotary_emb(x, torch.arange(x.shape[1])[None])
        split = (*x.shape[:2], -1, whole.head_dim)
        q, k, v = (f(normed).view(split).transpose(1, 2) for f in (whole.q_proj, whole.k_proj, whole.v_proj))
        return *apply_rotary_pos_emb(q, k, *positions), v

    def attend(self, layer: int, x: Tensor) -> Tensor:
        return scaled_dot_product_attention(*self.calls(layer, x), is_causal=True, enable_gqa=True)

    def finish(self, layer: int, x: Tensor, out: Tensor) -> Tensor:
        """The output of a layer, whose attention gave `out`."""
        block = self.inner.layers[layer]
        x = x + block.self_attn.o_proj(out.transpose(1, 2).flatten(2))
        return x + block.mlp(block.post_attention_layernorm(x))

    def predict(self, x: Tensor, rows: Tensor) -> Tensor:
        return torch.log_softmax(self.loaded.model.lm_head(self.inner.norm(x[:, rows])).float(), -1)


def judged(length: int) -> Tensor:
    """Every second row of the second half of the prose, and of the last three quarters of the code."""
    half = length // 2
    return torch.cat([torch.arange(half // 2, half, 2), torch.arange(half + half // 4, length - 2, 2)])


@torch.inference_mode()
def weigh(loaded: LoadedModel, sample: EvaluationSample, path: Path) -> Weights:
    """The weight of each head, as in `weigh_heads`; each layer's is written at once."""
    layers, rows, inputs, outs = Layers(loaded, sample.tokens), judged(len(sample.tokens)), [], []
    x, num = layers.inner.embed_tokens(sample.tokens[None]), fingerprint(loaded.model).num_layers
    for layer in range(num):
        inputs.append(x)
        outs.append(layers.attend(layer, x))
        x = layers.finish(layer, x, outs[-1])
    exact = layers.predict(x, rows)[0]
    found = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    for layer in sorted({*range(num)} - {each["layer"] for each in found}):
        found.append({"layer": layer, **_move(layers, layer, inputs[layer], outs[layer], exact, rows)})
        with path.open("a") as file:
            file.write(json.dumps(found[-1]) + "\n")
        print(f"weights of layer {layer}", flush=True)
    pairs = {each["layer"]: zip(each["nats"], each["squares"], strict=True) for each in found}
    return {layer: tuple(nats / square if square > 0 else 0.0 for nats, square in each) for layer, each in pairs.items()}


def _move(layers: Layers, layer: int, x: Tensor, out: Tensor, exact: Tensor, rows: Tensor) -> dict[str, list[float]]:
    """Squared errors of the probe's heads, and how far predictions move if one of them runs it."""
    q, k, v = layers.calls(layer, x)
    heads, group = k.shape[1], q.shape[1] // k.shape[1]
    ours = PROBE.output(Problem(q, k, v, q.shape[-1] ** -0.5, causal=True, seed=0, layer=layer)).float()
    squares = [(each.double().square().sum((0, 2, 3)).unflatten(0, (heads, group)).sum(1)) for each in (ours - out, out)]
    # one kv head replaced in each
    mixed = out.repeat(heads, 1, 1, 1)
    for head in range(heads):
        mixed[head, head * group : (head + 1) * group] = ours[0, head * group : (head + 1) * group]
    x = layers.finish(layer, x.expand(heads, -1, -1), mixed)
    for later in range(layer + 1, len(layers.inner.layers)):
        x = layers.finish(later, x, layers.attend(later, x))
    moved = [layers.predict(each[None], rows)[0] - exact for each in x]
    # sum_j p_j (exp(d_j) - 1 - d_j) is the divergence, without the cancelling terms
    nats = [float((exact.exp() * (torch.expm1(each) - each)).sum(-1).mean()) for each in moved]
    return {"squares": (squares[0] / squares[1]).tolist(), "nats": nats}


def measure(loaded: LoadedModel, sample: EvaluationSample, kept: Journal) -> Pass:
    """Squared errors of every candidate in every layer, in a pass with exact attention."""

    def add(call: CallInputs) -> None:
        if not kept.has(0, call.layer):
            kept.add(sample_layer(call, LADDER, 0, 0, NUM_PARTS))
            print(f"errors of layer {call.layer}", flush=True)

    return run_pass(loaded, sample, Row("exact", "exact", Exact()), on_call=add)


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, default=FOLDER, help="the folder; written first if it is not there")
    parser.add_argument("--pairs", type=int, default=500)
    parser.add_argument("--length", type=int, default=8192, help="tokens at which squared errors are measured")
    parser.add_argument("--short", type=int, default=2048, help="tokens at which weights are measured")
    parser.add_argument("--out", type=Path, required=True, help="the plan; its measurements are written beside it")
    options = parser.parse_args(words)
    loaded = load_model(prepare(options.model))
    sample, short = (
        samples_of_text(calibration_text(loaded, length), loaded, length, 1)[0] for length in (options.length, options.short)
    )
    about = describe(loaded, [sample], CalibrationSettings(pairs=options.pairs))
    kept = Journal(options.out.with_suffix(".journal"), about | {"ladder": [method_to_json(each) for each in LADDER]})
    exact = measure(loaded, sample, kept)
    weights = weigh(loaded, short, options.out.with_suffix(".weights"))
    chosen = allocate(kept.measurements, LADDER, weights, options.pairs, options.length)
    layers = {layer: method for layer, (method, _) in chosen.items()}
    errors = {layer: found for layer, (_, found) in chosen.items()}
    ours, cost = run_pass(loaded, sample, Row("plan", "plan", ByLayer(layers))), ByLayer(layers).cost(options.length)
    added = ours.nats_per_byte - exact.nats_per_byte
    measured = Measured(
        **{name: value for name, value in about.items() if name != "model"},
        pairs_per_query=cost.pairs,
        exact_pairs_per_query=cost.exact_pairs,
        seconds=ours.attention_seconds,
        exact_seconds=exact.attention_seconds,
        added_nats=added,
    )
    tolerance = math.ceil(max(map(max, errors.values())) * 1000) / 1000
    save_plan(Plan(fingerprint(loaded.model), layers, errors, tolerance, None, measured), options.out)
    print(f"{cost.pairs:.0f} pairs a query, {added:+.4f} nats a byte of the calibration text")


if __name__ == "__main__":
    main()
