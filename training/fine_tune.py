"""Fine-tune the reference model to a longer context through approximate attention, with a trainer that people use.

    pip install -e '.[train]'                                                # accelerate, for transformers' Trainer
    python training/fine_tune.py --method default --out build/fine_tune.jsonl
    python training/fine_tune.py --method exact --out build/fine_tune.jsonl  # the same data and steps: the curve beside it
    python training/fine_tune.py --trainer trl --method default              # needs `pip install trl` as well
    torchrun --nproc-per-node 2 training/fine_tune.py --fsdp --method default

The sequences are set/get documents over source code (`batches.py`). With Trainer, positions of a sequence jump, so that
rotations of distances up to `--positions` are seen in shorter sequences (positional skip-wise training: Zhu et al., 2023,
arXiv:2309.10400); SFTTrainer passes no positions on, so there a sequence has its own. What the recipe adds to ordinary code
is a callback that switches attention for each step (`Approximate`): gradients flow through the listed keys, draws differ
between steps, and everything else is the trainer's.

Each run appends its lines to `--out`: what ran, the loss of each step, and the seconds of training.
"""

import argparse
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from batches import Batches
from sources import corpus
from stages import Stage
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

import hyperattention as ha
from hyperattention.bench.rows import control_of, find_default
from hyperattention.files.records import environment, find_commit
from hyperattention.integrations.transformers import use
from hyperattention.methods.base import AttentionMethod
from hyperattention.reference.model import load_reference

# also below the length from which it runs by itself
DEFAULT = find_default()
METHODS: dict[str, AttentionMethod] = {"exact": ha.Exact(), "default": DEFAULT, "control": control_of(DEFAULT)}


@dataclass(frozen=True)
class Examples(Dataset[dict[str, Tensor]]):
    """Sequences as a trainer takes them, each a pure function of the seed and its number.

    Args:
        batches: what makes the sequences.
        count: number of sequences.
        jumps: whether positions are given, which may jump.
    """

    batches: Batches
    count: int
    jumps: bool

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        tokens, positions, _ = (x[0] for x in self.batches[number])
        tokens = tokens[:-1]
        given = {"input_ids": tokens, "labels": tokens}
        # a mask without padding: without one, transformers takes a jump for the start of another document
        return given | {"position_ids": positions, "attention_mask": torch.ones_like(tokens)} if self.jumps else given


class Approximate(TrainerCallback):
    """Run each step of training with the method, and with the number of the step as the seed of its draws."""

    def __init__(self, model: PreTrainedModel, method: AttentionMethod) -> None:
        self.model, self.method, self.approximated, self.calls = model, method, 0, 0
        self._step = ExitStack()

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        """Switch attention; a step has one or more batches, and recomputes activations within it too."""
        seed = args.seed + state.global_step
        self._counter = self._step.enter_context(use(self.model, self.method, seed=seed, warn=False))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        """Switch back, and count what was approximated."""
        self._step.close()
        self.approximated += self._counter.counts.approximated
        self.calls += self._counter.counts.total


def longer(model: PreTrainedModel, positions: int) -> PreTrainedModel:
    """Let a model read up to `positions` tokens; its rotations stay, and training teaches it those of new distances."""
    model.config.max_position_embeddings = max(positions, model.config.max_position_embeddings)
    return model.float()


def trainer_of(given: argparse.Namespace, model: PreTrainedModel, batches: Batches, folder: str) -> Trainer:
    """Make the trainer that was asked for; nothing in it knows of the method."""
    count = given.steps * given.batch * given.processes
    options = {
        "output_dir": folder, "max_steps": given.steps, "per_device_train_batch_size": given.batch,
        "learning_rate": given.rate,
        "warmup_steps": 1, "logging_steps": 1, "save_strategy": "no", "report_to": "none", "seed": given.seed,
        "use_cpu": not torch.cuda.is_available(), "disable_tqdm": True, "dataloader_pin_memory": False,
        "activation_checkpointing": given.checkpoint, "fsdp": True if given.fsdp else None,
        "fsdp_config": {"fsdp_version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]} if given.fsdp else None,
    }  # fmt: skip
    if given.trainer == "transformers":
        return Trainer(model, TrainingArguments(**options), train_dataset=Examples(batches, count, jumps=True))
    # of the trainers only TRL needs these, and `make setup` does not install them
    import datasets  # pyright: ignore[reportMissingImports]
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer  # pyright: ignore[reportMissingImports]

    # the tokens are made already: TRL asks a tokenizer for the token that pads
    words = Tokenizer(models.WordLevel({str(byte): byte for byte in range(model.config.vocab_size)}, "0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="0", eos_token="10")
    examples = Examples(batches, count, jumps=False)
    rows = datasets.Dataset.from_list([{"input_ids": examples[i]["input_ids"].tolist()} for i in range(count)])
    settings = SFTConfig(**options, max_length=given.length, dataset_kwargs={"skip_prepare_dataset": True})
    return SFTTrainer(model, settings, train_dataset=rows, processing_class=tokenizer)


def fine_tune(given: argparse.Namespace) -> list[Mapping[str, object]]:
    """Fine-tune, and return what ran and the loss of every step."""
    torch.manual_seed(given.seed)
    # read now: the checkout may change while an hour of training runs
    commit = find_commit()
    share = METHODS[given.method].cost(given.length).share_of_exact
    if given.method != "exact" and not share < 1:
        raise SystemExit(f"--length {given.length}: at this length the method lists all keys; give a longer one")
    if given.fsdp and not torch.cuda.is_available():
        raise SystemExit("--fsdp: without a GPU accelerate runs DDP instead; leave it out for that")
    model, method = longer(load_reference().model, given.positions), METHODS[given.method]
    texts = [text for source in corpus() for text in source.train]
    batches = Batches(texts, Stage(given.length, 1, 1), max_length=given.positions, repeats=False, seed=given.seed)
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(given, model, batches, folder)
        attention = Approximate(model, method)
        trainer.add_callback(attention)
        done = trainer.train()
        if given.save is not None:
            trainer.save_model(str(given.save))
    if given.method != "exact":
        assert attention.approximated == attention.calls > 0, (
            f"{attention.approximated} of {attention.calls} calls approximated"
        )
    run = {
        "kind": "fine_tune", "trainer": given.trainer, "method": given.method, "length": given.length, "seed": given.seed,
        "positions": given.positions if given.trainer == "transformers" else given.length, "steps": given.steps,
        "batch": given.batch, "rate": given.rate, "fsdp": given.fsdp, "processes": given.processes,
        "seconds": done.metrics["train_runtime"], "approximated": attention.approximated, "calls": attention.calls,
        "share_of_exact": share,
        "losses": [line["loss"] for line in trainer.state.log_history if "loss" in line],
    }  # fmt: skip
    return [run | {"environment": environment() | {"commit": commit}}] if trainer.is_world_process_zero() else []


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the arguments, fine-tune, and append what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trainer", choices=("transformers", "trl"), default="transformers")
    parser.add_argument("--method", choices=tuple(METHODS), default="default")
    parser.add_argument("--length", type=int, default=32_768, help="tokens of a sequence")
    parser.add_argument("--positions", type=int, default=65_536, help="largest position, with Trainer")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=1, help="sequences a process and step")
    parser.add_argument("--rate", type=float, default=1e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoint", action="store_true", help="recompute activations in the backward pass")
    parser.add_argument("--fsdp", action="store_true", help="shard weights over the processes of torchrun (FSDP2)")
    parser.add_argument("--out", type=Path, help="file of records, appended to")
    parser.add_argument("--save", type=Path, help="folder for the model")
    given = parser.parse_args(arguments)
    given.processes = int(os.environ.get("WORLD_SIZE", "1"))
    for line in fine_tune(given):
        print(json.dumps(line))
        if given.out is not None:
            with given.out.open("a") as file:
                file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
