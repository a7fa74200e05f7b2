"""The model in training: a byte-level Llama in plain PyTorch, written under the names of transformers' Llama."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Shape:
    layers: int = 4
    width: int = 384
    heads: int = 8
    kv_heads: int = 2
    head_dim: int = 64
    hidden: int = 1024
    rope_theta: float = 1e6
    vocab: int = 256
    norm_eps: float = 1e-5
    max_length: int = 32768


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
        exponent = torch.arange(0, s.head_dim, 2, device=positions.device) / s.head_dim
        angle = positions[:, None, :, None].float() * s.rope_theta**-exponent
        angle = torch.cat((angle, angle), -1)
        cos, sin = angle.cos(), angle.sin()
        x = F.embedding(tokens, self.embed)
        for block in self.blocks:
            x = block(x, cos, sin)
        return F.linear(F.rms_norm(x, (s.width,), self.norm, s.norm_eps), self.head)


def export(model: Model, folder: Path) -> None:
    """Write weights and configuration for transformers, in float16."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: p.detach().half().cpu().contiguous() for name, p in llama_state(model).items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(llama_config(model.shape), indent=2) + "\n")


def llama_state(model: Model) -> dict[str, Tensor]:
    """The parameters under the names of transformers' Llama."""
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
    return state


def llama_config(s: Shape) -> dict[str, object]:
    """The configuration of transformers' Llama."""
    return {
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
