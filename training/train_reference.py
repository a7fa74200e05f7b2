r"""Train the reference model: a byte-level Llama that really retrieves, on source code, on a GPU or a CPU.

    python training/train_reference.py --out build/reference --device cuda --workers 12 --seconds 235 \
        --source FOLDER --source FOLDER        # as many folders of source code as there are
    python training/train_reference.py --out build/small --steps 1100 --width 256 --heads 4 --hidden 704 --rope-theta 1e5 \
        --stages 512x12x800 2048x3x120 4096x2x60 8192x1x120        # about 80 minutes on two cores

The first command makes a model like the one in the package, the second one like the former model of 8,192 bytes. Ordinary
text and set/get documents (hyperattention.reference.documents) are mixed from the first step, so that induction forms early;
the length then grows in stages, up to the length that the model is judged at. In earlier stages, 40 % of the sequences get
random jumps in their positions, so that rotations of every distance are seen early (positional skip-wise training: Zhu et
al., 2023, arXiv:2309.10400). Matrices are trained with Muon, the rest with Adam. On a GPU the products are in bfloat16, and
weights and optimisers in float32. Files are held out by the hash of their names, in every folder.
"""

import argparse
import json
import math
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path

import torch
from batches import Batch, Batches, long_enough, read_batches
from byte_llama import Model, Shape, export
from muon import Muon
from sources import Source, corpus
from stages import SHIPPED, Budget, rate_at, read_stage, stage_at
from torch import Tensor, nn
from torch.nn import functional as F

from hyperattention.reference.documents import make_document

MATRIX_RATE, OTHER_RATE = 0.02, 6e-3
SAVE_SECONDS = 60
# of the shape, what an option sets; the largest length is that of the longest stage
SIZES = tuple(field for field in fields(Shape) if field.name not in {"vocab", "norm_eps", "max_length"})


class Training:
    """The model, its optimisers, and how far they are."""

    def __init__(self, shape: Shape, device: torch.device, num_stages: int, compiled: bool) -> None:
        self.device, self.step, self.elapsed, self.batches = device, 0, 0.0, [0] * num_stages
        self.model = Model(shape).to(device)
        self.run = torch.compile(self.model, dynamic=False) if compiled else self.model
        named = list(self.model.named_parameters())
        self.others = [p for name, p in named if p.ndim < 2 or not name.startswith("blocks")]
        self.muon = Muon([p for name, p in named if p.ndim == 2 and name.startswith("blocks")])
        self.adam = torch.optim.AdamW(self.others, lr=0.0, betas=(0.9, 0.95), weight_decay=0.0, fused=True)

    def logits(self, model: nn.Module, tokens: Tensor, positions: Tensor) -> Tensor:
        """Read tokens with the model, compiled or not; on a GPU in bfloat16."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            return model(tokens, positions).float()

    def advance(self, batch: Batch, rate: float) -> tuple[Tensor, Tensor]:
        """Take one step, and return the loss and the weight of every target."""
        tokens, positions, weight = (each.to(self.device, non_blocking=True) for each in batch)
        for optimiser, peak in ((self.muon, MATRIX_RATE), (self.adam, OTHER_RATE)):
            for group in optimiser.param_groups:
                group["lr"] = peak * rate
        logits, flat = self.logits(self.run, tokens[:, :-1], positions), weight.flatten()
        losses = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
        (losses * flat).sum().div(flat.sum()).backward()
        torch.nn.utils.clip_grad_norm_(self.others, 1.0)
        self.muon.step()
        self.adam.step()
        self.model.zero_grad(set_to_none=True)
        self.step += 1
        return losses.detach(), flat

    def save(self, out: Path, settings: dict[str, object]) -> None:
        """Write the model, and what a later run goes on from."""
        export(self.model, out / "latest")
        parts = {name: getattr(self, name).state_dict() for name in ("model", "muon", "adam")}
        place = {"step": self.step, "elapsed": self.elapsed, "batches": self.batches, "settings": json.dumps(settings)}
        torch.save(parts | place, out / "state.pt")

    def resume(self, path: Path, settings: dict[str, object]) -> None:
        """Go on from what another run wrote, if it had the same settings."""
        state = torch.load(path, map_location=self.device)
        if state["settings"] != json.dumps(settings):
            raise SystemExit(
                f"{path} was written by a run with {state['settings']}, and this run has {json.dumps(settings)}: "
                "resume with the same sizes, stages, seed and folders"
            )
        for name in ("model", "muon", "adam"):
            getattr(self, name).load_state_dict(state[name])
        self.step, self.elapsed, self.batches = state["step"], state["elapsed"], state["batches"]


@torch.no_grad()
def quick_check(training: Training, texts: Sequence[tuple[str, bytes]], length: int) -> dict[str, float]:
    """Bits a byte of ordinary text and share of answer digits right, on two held-out documents; empty without such texts."""
    rng, bits, right = random.Random(5), [], []
    for text in [text for _, text in texts if len(text) > length][:2]:
        document = make_document(text, length, max(1, length // 340), rng)
        tokens = torch.frombuffer(bytearray(document.data), dtype=torch.uint8).long()[None].to(training.device)
        positions = torch.arange(length - 1, device=training.device)[None]
        logits = training.logits(training.model, tokens[:, :-1], positions)[0]
        bits.append(F.cross_entropy(logits, tokens[0, 1:]).item() / math.log(2))
        for at in document.answer_index:
            window = slice(at - 1, at - 1 + document.answer_size)
            right += (logits[window].argmax(-1) == tokens[0, 1:][window]).tolist()
    found = {"bits_per_byte": bits, "digits_right": right}
    return {name: round(sum(values) / len(values), 4) for name, values in found.items() if values}


def note(out: Path, record: dict[str, object]) -> None:
    """Print a record, and append it to the log."""
    print(record, flush=True)
    with (out / "log.jsonl").open("a") as log:
        log.write(json.dumps(record) + "\n")


def losses_in_bits(losses: Tensor, weight: Tensor) -> dict[str, float | None]:
    """The mean loss of ordinary text and of answers."""
    parts = {"text_bits": losses[weight == 1], "answer_bits": losses[weight > 1]}
    return {name: round(part.mean().item() / math.log(2), 4) if len(part) else None for name, part in parts.items()}


def train(training: Training, args: argparse.Namespace, sources: Sequence[Source], settings: dict[str, object]) -> None:
    """Run all stages, and write the log, the model and the state."""
    budget, stages = Budget(args.steps, args.seconds), args.stages
    texts, kept = ([text for source in sources for text in getattr(source, part)] for part in ("train", "kept"))
    pools = [long_enough(texts, stage) for stage in stages]
    current, made, saved, last = None, iter(()), time.perf_counter(), time.perf_counter()
    while (share := budget.share(training.step, training.elapsed)) < 1:
        index = stage_at(stages, share)
        if index != current:
            batches = Batches(pools[index], stages[index], training.model.shape.max_length, index == 0, args.seed)
            made = read_batches(batches, training.batches[index], args.workers, args.device.type == "cuda")
            current = index
        losses, weight = training.advance(next(made), rate_at(training.step, share))
        training.batches[index] += 1
        training.elapsed += time.perf_counter() - last
        after = budget.share(training.step, training.elapsed)
        ends = after >= 1 or stage_at(stages, after) != index
        if ends or training.step % args.log_every == 0:
            record = {"step": training.step, "length": stages[index].length, "elapsed_s": round(training.elapsed, 1)}
            checked = quick_check(training, kept, stages[index].length) if ends else {}
            note(args.out, record | losses_in_bits(losses, weight) | checked)
        if ends or time.perf_counter() - saved > SAVE_SECONDS:
            training.save(args.out, settings)
            saved = time.perf_counter()
        # checks and files are not training: the shares of time do not count them
        last = time.perf_counter()


def read_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the log, the state and the model `latest`")
    lasts = parser.add_mutually_exclusive_group(required=True)
    lasts.add_argument("--steps", type=int, help="train this many steps; the shares of the stages are of steps")
    lasts.add_argument("--seconds", type=float, help="train this long; the shares of the stages are of time")
    parser.add_argument("--stages", type=read_stage, nargs="+", default=SHIPPED, metavar="LENGTHxBATCHxSHARE")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--workers", type=int, default=0, help="processes that make the data; any number makes the same")
    parser.add_argument("--source", type=Path, action="append", default=[], help="another folder of source code; repeatable")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log-every", type=int, default=20, help="steps between two lines of the log")
    parser.add_argument("--compile", action="store_true", help="compile the model (needs a C++ compiler)")
    parser.add_argument("--resume", type=Path, default=None, help="a state.pt that an earlier run wrote")
    for field in SIZES:
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=type(field.default), default=field.default,
                            help=f"of the model ({field.default:,})")  # fmt: skip
    args = parser.parse_args(arguments)
    if args.heads % args.kv_heads or args.head_dim % 2:
        parser.error(f"--heads {args.heads}, --kv-heads {args.kv_heads}, --head-dim {args.head_dim}: the heads must be a "
                     "multiple of the kv heads, and the width of a head even")  # fmt: skip
    if any(limit is not None and not limit > 0 for limit in (args.steps, args.seconds)):
        parser.error(f"--steps {args.steps}, --seconds {args.seconds}: give a positive number")
    if args.device.type == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device {args.device}: torch sees no such device; use another one, or a build of torch for it")
    return args


def main(arguments: Sequence[str] | None = None) -> None:
    args = read_arguments(arguments)
    torch.manual_seed(args.seed)
    if args.device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    sizes = {field.name: getattr(args, field.name) for field in SIZES}
    shape = Shape(**sizes, max_length=max(stage.length for stage in args.stages))
    sources = corpus(args.source)
    files = {each.name: {"files": len(each.train), "bytes": sum(map(len, each.train)), "held_out": len(each.kept)}
             for each in sources}  # fmt: skip
    stages = [asdict(stage) for stage in args.stages]
    settings: dict[str, object] = {"shape": asdict(shape), "stages": stages, "seed": args.seed, "sources": files}
    training = Training(shape, args.device, len(args.stages), args.compile)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.resume:
        training.resume(args.resume, settings)
    else:
        (args.out / "log.jsonl").write_text("")
        note(args.out, {"settings": settings, "device": str(args.device), "steps": args.steps, "seconds": args.seconds})
    train(training, args, sources, settings)


if __name__ == "__main__":
    main()
