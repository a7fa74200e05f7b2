"""A small language model of bytes, whose attention is softmax or polynomial, and the texts it is trained on."""

import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hyperattention.nn import PolySketchAttention
from hyperattention.nn.rotary import rotate

# the folder of training is no package
sys.path.insert(0, str(Path(__file__).parents[1] / "training"))

from muon import Muon
from sources import standard_library

MATRIX_RATE, OTHER_RATE = 0.02, 6e-3
CONSTANT_SHARE, FINAL_RATE = 0.4, 0.05
CONTROL = "blocks alone (control)"


@dataclass(frozen=True)
class Size:
    layers: int = 2
    width: int = 128
    heads: int = 2
    hidden: int = 512
    length: int = 1024
    batch: int = 1
    steps: int = 160
    warm_up: int = 16
    sketch: int = 32
    block: int = 128
    # steps between two judgements, and held-out sequences of each; of the last one
    every: int = 16
    judged: int = 4
    judged_last: int = 32


class SoftmaxAttention(nn.Module):
    """The baseline: the same projections and rotary positions, and torch's exact attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_projection, self.out_projection = (nn.Linear(width, n * width, bias=False) for n in (3, 1))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.in_projection(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = (rotate(each, 0, 10_000.0) for each in (q, k))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out_projection(out.transpose(1, 2).flatten(2))


class BlocksAlone(nn.Module):
    """The control: the exact weights within blocks, and nothing of earlier blocks."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.block = size.block
        # the random sketch is of no use: no text is longer than a block
        self.layer = PolySketchAttention(size.width, size.heads, sketch_size=1, block=size.block, learned=False)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] % self.block:
            raise ValueError(f"{x.shape[1]} tokens are no whole number of blocks of {self.block}")
        return self.layer(x.unflatten(1, (-1, self.block)).flatten(0, 1)).view(x.shape)


class Block(nn.Module):
    def __init__(self, size: Size, attention: nn.Module) -> None:
        super().__init__()
        self.attention_norm, self.norm = nn.RMSNorm(size.width), nn.RMSNorm(size.width)
        self.attention = attention
        self.gate_up = nn.Linear(size.width, 2 * size.hidden, bias=False)
        self.down = nn.Linear(size.hidden, size.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        gate, up = self.gate_up(self.norm(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


class LanguageModel(nn.Module):
    def __init__(self, size: Size, attention: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(256, size.width), nn.Linear(size.width, 256, bias=False)
        self.blocks = nn.ModuleList(Block(size, attention(layer)) for layer in range(size.layers))
        self.norm = nn.RMSNorm(size.width)
        nn.init.normal_(self.embed.weight, std=0.02)
        nn.init.zeros_(self.head.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))

    def loss(self, tokens: Tensor) -> Tensor:
        return F.cross_entropy(self(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def attentions(size: Size) -> dict[str, Callable[[int, int], nn.Module]]:
    """What is compared, by name: each makes the attention of a layer from the seed and the layer's number."""

    def sketched(**options: object) -> Callable[[int, int], nn.Module]:
        # a random sketch of its own for each layer and seed
        return lambda seed, layer: PolySketchAttention(
            size.width, size.heads, sketch_size=size.sketch, seed=100 * seed + layer, **options
        )

    return {
        "softmax": lambda seed, layer: SoftmaxAttention(size.width, size.heads),
        CONTROL: lambda seed, layer: BlocksAlone(size),
        "polynomial, exact": sketched(block=size.length, learned=False),
        "learned sketch": sketched(block=size.block, learned=True),
        "random sketch": sketched(block=size.block, learned=False),
    }


@dataclass(frozen=True)
class Texts:
    """Texts of the standard library, and what is held out of them by the rule of the reference model."""

    train: Sequence[bytes]
    kept: Sequence[bytes]

    @staticmethod
    def read() -> "Texts":
        source = standard_library()
        return Texts(source.train, [text for _, text in source.kept])

    def batch(self, of: str, size: Size, number: object) -> Tensor:
        """Sequences that are a pure function of the number, drawn by length."""
        texts: Sequence[bytes] = getattr(self, of)
        rng, sizes = random.Random(f"{of}, {number}"), list(accumulate(map(len, texts)))
        rows = []
        for _ in range(size.batch):
            data = b""
            while len(data) < size.length + 1:
                text = rng.choices(texts, cum_weights=sizes)[0]
                start = rng.randrange(max(1, len(text) - size.length // 2))
                data += text[start : start + size.length + 1] + b"\n"
            rows.append(torch.frombuffer(bytearray(data[: size.length + 1]), dtype=torch.uint8).long())
        return torch.stack(rows)


class Trainer:
    """The model and its optimisers: those of the reference model, with its rates, for every kind of attention."""

    def __init__(self, size: Size, name: str, seed: int) -> None:
        torch.manual_seed(seed)
        make = attentions(size)[name]
        self.size, self.seed, self.model = size, seed, LanguageModel(size, lambda layer: make(seed, layer))
        matrices = [p for p in self.model.blocks.parameters() if p.ndim == 2]
        chosen = set(map(id, matrices))
        self.others = [p for p in self.model.parameters() if id(p) not in chosen]
        self.muon = Muon(matrices)
        self.adam = torch.optim.AdamW(self.others, lr=0.0, betas=(0.9, 0.95), weight_decay=0.0)

    def rate(self, step: int) -> float:
        """A warm-up, then constant, then linear to a small rest."""
        share = max(0.0, step / self.size.steps - CONSTANT_SHARE) / (1 - CONSTANT_SHARE)
        return min(1.0, (step + 1) / self.size.warm_up) * (1 - (1 - FINAL_RATE) * share)

    def advance(self, texts: Texts, step: int) -> float:
        """Take a step, and return the loss before it; the data depend on the seed and the step alone."""
        for optimiser, peak in ((self.muon, MATRIX_RATE), (self.adam, OTHER_RATE)):
            for group in optimiser.param_groups:
                group["lr"] = peak * self.rate(step)
        loss = self.model.loss(texts.batch("train", self.size, (self.seed, step)))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.others, 1.0)
        self.muon.step()
        self.adam.step()
        self.model.zero_grad(set_to_none=True)
        return loss.item()

    @torch.no_grad()
    def judge(self, texts: Texts, sequences: int) -> float:
        """The mean loss of held-out text, in nats a byte; the same text for every attention and seed."""
        batches = max(1, sequences // self.size.batch)
        return sum(self.model.loss(texts.batch("kept", self.size, number)).item() for number in range(batches)) / batches
