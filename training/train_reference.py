"""Train the reference model: a byte-level Llama that really retrieves, on the standard library's sources, on a CPU.

    python training/train_reference.py --out build/reference        # about 80 minutes on two cores

Ordinary text and set/get documents (hyperattention.reference.documents) are mixed from the first step, so that induction
forms early; the length then grows in stages, up to the length the model is judged at. While sequences are short, half of
them get random jumps in their positions, so that rotations of every distance up to the judged length are seen early
(positional skip-wise training: Zhu et al., 2023, arXiv:2309.10400). Matrices are trained with Muon, the rest with Adam.
"""

import argparse
import hashlib
import json
import math
import random
import sysconfig
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hyperattention.reference.documents import make_document


@dataclass(frozen=True)
class Shape:
    layers: int = 4
    width: int = 256
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    hidden: int = 704
    vocab: int = 256
    rope_theta: float = 1e5
    norm_eps: float = 1e-5
    max_length: int = 8192


@dataclass(frozen=True)
class Stage:
    length: int
    batch: int
    steps: int


STAGES = (Stage(512, 12, 800), Stage(2048, 3, 120), Stage(4096, 2, 60), Stage(8192, 1, 120))
PEAK_RATE, FINAL_SHARE, WARM_UP = 0.02, 0.05, 60


def held_out(path: Path) -> bool:
    """Whole files are held out, chosen by their name alone."""
    return hashlib.sha256(path.name.encode()).digest()[0] < 20


def corpus() -> tuple[list[bytes], list[tuple[str, bytes]]]:
    """Training texts, and held-out files by name: the standard library without tests and tables."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skip = {"test", "tests", "site-packages", "encodings", "pydoc_data", "idle_test", "__pycache__", "lib2to3"}
    train: list[bytes] = []
    kept: list[tuple[str, bytes]] = []
    for path in sorted(root.rglob("*.py")):
        if skip & set(path.relative_to(root).parts):
            continue
        data = path.read_bytes()
        if len(data) < 512:
            continue
        if held_out(path):
            kept.append((str(path.relative_to(root)), data))
        else:
            train.append(data)
    return train, kept


class Block(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        s = self.shape = shape
        self.input_layernorm = nn.Parameter(torch.ones(s.width))
        self.post_attention_layernorm = nn.Parameter(torch.ones(s.width))
        std = 0.5 / math.sqrt(s.width)
        self.qkv = nn.Parameter(torch.randn((s.heads + 2 * s.kv_heads) * s.head_dim, s.width) * std)
        self.o = nn.Parameter(torch.zeros(s.width, s.heads * s.head_dim))
        self.gate_up = nn.Parameter(torch.randn(2 * s.hidden, s.width) * std)
        self.down = nn.Parameter(torch.zeros(s.width, s.hidden))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        s = self.shape
        b, n, _ = x.shape
        y = F.rms_norm(x, (s.width,), self.input_layernorm, s.norm_eps)
        qkv = F.linear(y, self.qkv).view(b, n, -1, s.head_dim).transpose(1, 2)
        qk, v = qkv.split((s.heads + s.kv_heads, s.kv_heads), dim=1)
        half = s.head_dim // 2
        qk = qk * cos + torch.cat((-qk[..., half:], qk[..., :half]), -1) * sin
        q, k = qk.split((s.heads, s.kv_heads), dim=1)
        k, v = (x.repeat_interleave(s.heads // s.kv_heads, dim=1) for x in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + F.linear(out.transpose(1, 2).reshape(b, n, -1), self.o)
        y = F.rms_norm(x, (s.width,), self.post_attention_layernorm, s.norm_eps)
        gate, up = F.linear(y, self.gate_up).chunk(2, -1)
        return x + F.linear(F.silu(gate) * up, self.down)


class Model(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embed = nn.Parameter(torch.randn(shape.vocab, shape.width) * 0.02)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.Parameter(torch.ones(shape.width))
        self.head = nn.Parameter(torch.zeros(shape.vocab, shape.width))

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        s = self.shape
        exponent = torch.arange(0, s.head_dim, 2) / s.head_dim
        angle = positions[:, None, :, None].float() * s.rope_theta**-exponent
        angle = torch.cat((angle, angle), -1)
        cos, sin = angle.cos(), angle.sin()
        x = F.embedding(tokens, self.embed)
        for block in self.blocks:
            x = block(x, cos, sin)
        return F.linear(F.rms_norm(x, (s.width,), self.norm, s.norm_eps), self.head)


def orthogonalise(g: Tensor, steps: int = 5) -> Tensor:
    """Newton-Schulz towards the nearest orthogonal matrix (Jordan et al., 2024, Muon), in float32."""
    x = g / (g.norm() + 1e-7)
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    for _ in range(steps):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.T if tall else x


class Muon(torch.optim.Optimizer):
    def __init__(self, params, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": 0.0, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                buffer.lerp_(p.grad, 1 - group["momentum"])
                g = p.grad.lerp(buffer, group["momentum"])
                # fused projections are orthogonalised one by one
                for part, target in zip(g.split(256), p.split(256), strict=True):
                    rows, cols = part.shape
                    target.mul_(1 - group["lr"] * 0.02)
                    target.add_(orthogonalise(part), alpha=-group["lr"] * max(1, rows / cols) ** 0.5)


def batch(texts: list[bytes], weights: list[float], stage: Stage, rng: random.Random, max_length: int):
    """Tokens, positions and the weight of each target: answers' digits count more than ordinary bytes."""
    tokens, positions, target_weight = [], [], []
    for _ in range(stage.batch):
        data = b""
        while len(data) < stage.length + 1:
            text = rng.choices(texts, weights)[0]
            start = rng.randrange(max(1, len(text) - stage.length // 2))
            data += text[start : start + stage.length + 1] + b"\n"
        weight = torch.ones(stage.length + 1)
        if stage.length == STAGES[0].length and rng.random() < 0.25:
            # a random string, again and again: every byte after its first copy asks for induction
            size = rng.randrange(16, stage.length // 2)
            data = (bytes(rng.choices(b"abcdefghijklmnopqrstuvwxyz=0123456789", k=size)) * (stage.length // size + 1)) + data
        elif rng.random() < 0.75:
            pairs = round(stage.length / rng.uniform(40, 150))
            document = make_document(data, stage.length + 1, pairs, rng)
            data = document.data
            for at in document.answer_index:
                weight[at : at + document.answer_size] = 6.0
        position = torch.arange(stage.length)
        spare = max_length - stage.length
        if spare > 0 and rng.random() < 0.4:
            for _ in range(rng.randrange(1, 4)):
                cut, jump = rng.randrange(stage.length), rng.randrange(spare // 3 + 1)
                position[cut:] += jump
        tokens.append(torch.frombuffer(bytearray(data[: stage.length + 1]), dtype=torch.uint8).long())
        positions.append(position)
        target_weight.append(weight[1:])
    return torch.stack(tokens), torch.stack(positions), torch.stack(target_weight)


def export(model: Model, out: Path, name: str) -> None:
    """Write weights under the names of transformers' Llama, in float16."""
    from safetensors.torch import save_file

    s = model.shape
    state = {"model.embed_tokens.weight": model.embed, "model.norm.weight": model.norm, "lm_head.weight": model.head}
    for i, block in enumerate(model.blocks):
        at = f"model.layers.{i}."
        q, k, v = block.qkv.split((s.heads * s.head_dim, s.kv_heads * s.head_dim, s.kv_heads * s.head_dim))
        gate, up = block.gate_up.chunk(2)
        state |= {
            at + "input_layernorm.weight": block.input_layernorm,
            at + "post_attention_layernorm.weight": block.post_attention_layernorm,
            at + "self_attn.q_proj.weight": q,
            at + "self_attn.k_proj.weight": k,
            at + "self_attn.v_proj.weight": v,
            at + "self_attn.o_proj.weight": block.o,
            at + "mlp.gate_proj.weight": gate,
            at + "mlp.up_proj.weight": up,
            at + "mlp.down_proj.weight": block.down,
        }
    folder = out / name
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {k: v.detach().half().contiguous() for k, v in state.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": s.width,
        "intermediate_size": s.hidden,
        "num_hidden_layers": s.layers,
        "num_attention_heads": s.heads,
        "num_key_value_heads": s.kv_heads,
        "head_dim": s.head_dim,
        "vocab_size": s.vocab,
        "rms_norm_eps": s.norm_eps,
        "rope_theta": s.rope_theta,
        "max_position_embeddings": s.max_length,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        "dtype": "float16",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


@torch.no_grad()
def quick_check(model: Model, texts: list[tuple[str, bytes]], length: int) -> dict[str, float]:
    """Bits a byte of ordinary text and share of answer digits right, on two held-out documents."""
    rng = random.Random(5)
    long = [t for _, t in texts if len(t) > length]
    bits, right, count = 0.0, 0, 0
    for text in long[:2]:
        document = make_document(text, length, 24, rng)
        tokens = torch.frombuffer(bytearray(document.data), dtype=torch.uint8).long()[None]
        logits = model(tokens[:, :-1], torch.arange(length - 1)[None])[0]
        bits += F.cross_entropy(logits, tokens[0, 1:]).item() / math.log(2) / 2
        for at in document.answer_index:
            window = slice(at - 1, at - 1 + document.answer_size)
            right += int((logits[window].argmax(-1) == tokens[0, 1:][window]).sum())
            count += document.answer_size
    return {"bits_per_byte": round(bits, 4), "digits_right": round(right / max(count, 1), 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true", help="compile the model (needs a C++ compiler)")
    parser.add_argument("--resume", type=Path, default=None, help="a state.pt written by an earlier run")
    parser.add_argument("--time", type=int, default=0, help="only time this many steps of each stage")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    shape = Shape()
    train, kept = corpus()
    print(f"{len(train)} training files, {sum(map(len, train)) / 1e6:.1f} MB")
    print(f"{len(kept)} held out, {sum(len(t) for _, t in kept) / 1e6:.2f} MB")
    model = Model(shape)
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and n.startswith("blocks")]
    others = [p for n, p in model.named_parameters() if p.ndim < 2 or not n.startswith("blocks")]
    muon = Muon(matrices)
    adam = torch.optim.AdamW(others, lr=0.0, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    total = sum(stage.steps for stage in STAGES)
    done = 0
    if args.resume:
        state = torch.load(args.resume, weights_only=False)
        model.load_state_dict(state["model"])
        muon.load_state_dict(state["muon"])
        adam.load_state_dict(state["adam"])
        rng.setstate(state["rng"])
        done = state["done"]
    run = torch.compile(model, dynamic=False) if args.compile else model
    args.out.mkdir(parents=True, exist_ok=True)
    log = (args.out / "log.jsonl").open("a")
    step = 0
    start = time.time()
    for stage in STAGES:
        sampled = [t for t in train if len(t) >= min(stage.length // 2, 8192)]
        weights = [float(len(t)) for t in sampled]
        for i in range(stage.steps):
            step += 1
            if args.time and i >= args.time:
                continue
            if step <= done:
                continue
            share = step / total
            rate = min(1.0, step / WARM_UP) * (1.0 if share < 0.35 else FINAL_SHARE + (1 - FINAL_SHARE) * (1 - share) / 0.65)
            for group in muon.param_groups:
                group["lr"] = PEAK_RATE * rate
            for group in adam.param_groups:
                group["lr"] = 6e-3 * rate
            tokens, positions, weight = batch(sampled, weights, stage, rng, shape.max_length)
            began = time.time()
            logits = run(tokens[:, :-1], positions)
            losses = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
            flat = weight.flatten()
            (losses * flat).sum().div(flat.sum()).backward()
            torch.nn.utils.clip_grad_norm_(others, 1.0)
            muon.step()
            adam.step()
            model.zero_grad(set_to_none=True)
            text = losses.detach()[flat == 1].mean().item() / math.log(2)
            answer = losses.detach()[flat > 1].mean().item() / math.log(2) if (flat > 1).any() else None
            record = {
                "step": step,
                "length": stage.length,
                "text_bits": round(text, 4),
                "answer_bits": answer and round(answer, 4),
                "step_s": round(time.time() - began, 3),
                "elapsed_s": round(time.time() - start),
            }
            if args.time:
                print(record, flush=True)
                continue
            if step % 25 == 0 or i + 1 == stage.steps:
                with torch.no_grad():
                    record |= quick_check(model, kept, stage.length) if step % 50 == 0 or i + 1 == stage.steps else {}
                export(model, args.out, "latest")
                torch.save(
                    {
                        "model": model.state_dict(),
                        "muon": muon.state_dict(),
                        "adam": adam.state_dict(),
                        "rng": rng.getstate(),
                        "done": step,
                    },
                    args.out / "state.pt",
                )
                if i + 1 == stage.steps:
                    export(model, args.out, f"length{stage.length}")
                print(record, flush=True)
            log.write(json.dumps(record) + "\n")
            log.flush()
    (args.out / "shape.json").write_text(json.dumps({"shape": asdict(shape), "stages": [asdict(s) for s in STAGES]}))


if __name__ == "__main__":
    main()
