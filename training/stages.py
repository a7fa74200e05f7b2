"""What is trained when: stages of growing length, each for a share of all steps or of all time, and the rate."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

FINAL_RATE, CONSTANT_SHARE, WARM_UP = 0.05, 0.35, 60


@dataclass(frozen=True)
class Stage:
    """Sequences of one length, for a share of the training; shares are relative to their sum."""

    length: int
    batch: int
    share: float


SHIPPED = (Stage(512, 128, 30), Stage(2048, 32, 15), Stage(8192, 8, 20), Stage(32768, 2, 35))


def read_stage(text: str) -> Stage:
    """Read a stage such as 512x128x30."""
    try:
        length, batch, share = text.split("x")
        stage = Stage(int(length), int(batch), float(share))
    except ValueError:
        raise argparse.ArgumentTypeError(f"stage {text!r}: give LENGTHxBATCHxSHARE, such as 512x128x30") from None
    if stage.length < 64 or stage.batch < 1 or not stage.share > 0:
        raise argparse.ArgumentTypeError(f"stage {text!r}: give a length of at least 64, a positive batch and share")
    return stage


@dataclass(frozen=True)
class Budget:
    """How long training lasts: a number of steps, or else of seconds in steps."""

    steps: int | None
    seconds: float | None

    def share(self, step: int, elapsed: float) -> float:
        """The share of the training that is over after `step` steps in `elapsed` seconds; 1 ends it."""
        return step / self.steps if self.seconds is None else elapsed / self.seconds


def stage_at(stages: Sequence[Stage], share: float) -> int:
    """The index of the stage at a share of the training."""
    total, ended = sum(stage.share for stage in stages), 0.0
    for index, stage in enumerate(stages):
        ended += stage.share
        if share < ended / total:
            return index
    return len(stages) - 1


def rate_at(step: int, share: float) -> float:
    """The factor of all learning rates: a warm-up by steps, then constant, then linear to a small rest."""
    warm = min(1.0, (step + 1) / WARM_UP)
    return warm * (1 if share < CONSTANT_SHARE else 1 - (1 - FINAL_RATE) * (share - CONSTANT_SHARE) / (1 - CONSTANT_SHARE))
