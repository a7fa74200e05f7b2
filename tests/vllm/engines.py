"""Engines in processes of their own, and prompts for them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

PROGRAM = Path(__file__).with_name("engine.py")


def run_engines(cases: list[dict], *, plugin: bool = True) -> list[dict]:
    """Run engines in one new process: with the plugin in place of the CPU's attention, or stock."""
    environment = os.environ | {"HYPERATTENTION_VLLM_CPU": str(int(plugin)), "OMP_NUM_THREADS": "2"}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, PROGRAM], input=json.dumps(cases), capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return torch.randint(0, 256, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
