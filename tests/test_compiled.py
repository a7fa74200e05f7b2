"""Every Triton kernel compiles for GPUs that are not here, fits their shared memory, and spills nothing at default sizes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the test extra installs Triton, which CPU builds of torch do not bring")

PROGRAM = Path(__file__).parent / "compile_kernels.py"
FEATURES = Path(__file__).parent / "compile_feature_kernels.py"
# 8.6 and 8.9 run what 8.0 does, with less shared memory
SHARED = {80: 99 * 1024, 90: 227 * 1024}
# bytes that the fast list kernel may spill: accumulators of 128 rows and 128 numbers take half of a thread's registers, and
# what spills is touched once a program or a few times a block. Compiled: 136 under Triton 3.6.0, 64 under 3.9.0
FAST_SPILLS = {
    ("flat forward, 128 rows", 90, 128): 64, ("flat forward, 256 rows", 90, 128): 64,
    ("flat forward, sinks and window", 90, 128): 40,
}  # fmt: skip
# blocks of keys and of values in each loop: two over ranges, and two over a list, which lists need not all have
FAST_LOOPS = {"flat forward, drawn keys": 2, "flat forward, sinks and window": 3}
# the conversion to a flat list runs once a tile; on sm_80 a thread of it has fewer registers
FLATTEN_SPILLS = {80: 8, 90: 0}
# a few numbers of a thread, which its loops hardly touch, so that a multiprocessor holds two programs
SORTING_SPILLS = {80: 0, 90: 56}
# two numbers of a thread: at 128 registers a multiprocessor holds the next program, which is worth more
MASS_SPILLS = {80: 8, 90: 0}
# directions of keys, in float32
BASIS_SPILLS = {80: 16, 90: 0}
# a choice that opens blocks, by averages of a list: numbers that are touched once for the lists of a program, or in loops
CHOICE_SPILLS = {(8, 80): 16, (8, 90): 216, (16, 80): 32, (16, 90): 160}
# older kernels whose loops wait for whole blocks, and how many of them each loop waits for: not yet rewritten
SYNCHRONOUS = {"backward, keys": 2, "keys prepared": 2, "queries of": 2}
# passes over the rows of a tile and slices of a factor, which stay in the cache, or over keys once a call: other programs
# run meanwhile. Slices fetched in the background would take registers, of which 120 bytes were spilled. In a choice: queries
# and averages, once for some lists, and shares while draws are placed, which are loaded a step ahead
# (directions in 16 bits, too short for such loads, are one of sorting's)
PASSES = {"alike sorting": 9, "alike first": 3, "alike blocks": 2, "alike factors": 3, "alike choice": 11}
# blocks that are opened: averages are read for each size of them, and once more to take sums away
OPENED_PASSES = 18
# blocks that the loops of a choice over keys, over blocks and over shares fetch in the background
BACKGROUND = {"keys": 16, "opened": 28}


def refuse_what_makes_gathers_slow(kernel: dict, capability: int) -> None:
    """The fast list kernel: everything gathered in the background, no products that wait for one another, no spills."""
    assert kernel["synchronous"] == 0, kernel
    assert kernel["asynchronous"] == 2 * FAST_LOOPS.get(kernel["kernel"], 4), kernel
    assert kernel["serialised"] == [], kernel
    assert kernel["spilled"] <= FAST_SPILLS.get((kernel["kernel"], capability, kernel["dim"]), 0), kernel


def compiled(capability: int, dtype: str, *dims: int, program: Path = PROGRAM) -> list[dict]:
    # kernels defined for the interpreter cannot be compiled: another process, which is not told to interpret
    outside = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", str(program), str(capability), dtype, *map(str, dims)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=outside)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.heavy  # each compiles for more than a minute
@pytest.mark.parametrize(
    ("dim", "capability"),
    [(64, 90), (64, 80), (128, 80), (128, 90)],
)
def test_default_sizes_fit_and_spill_nothing(dim, capability):
    kernels = compiled(capability, "bfloat16", dim)
    assert len(kernels) == 2 * 7 + 4 * 2 + 2 + 5 + 3 + 3 + 8 + 7 + (3 * 3 + 11 + 2 if dim == 64 else 0)
    for kernel in kernels:
        assert kernel["shared"] <= SHARED[capability], kernel
        # what tests labels as well, and groups of sixteen heads, may spill a little
        large = kernel["kernel"].startswith("block") and "256 rows" in kernel["kernel"]
        most = 64 if large or "hashed" in kernel["kernel"] else 0
        if kernel["kernel"].startswith("flatten"):
            assert kernel["spilled"] <= FLATTEN_SPILLS[capability], kernel
        elif kernel["kernel"].startswith("alike sorting"):
            assert kernel["spilled"] <= SORTING_SPILLS[capability], kernel
        elif kernel["kernel"].endswith("opened"):
            groups = int(kernel["kernel"].split(", ")[1].split()[0])
            assert kernel["spilled"] <= CHOICE_SPILLS[groups, capability], kernel
        elif kernel["kernel"] == "block mass, blocks of 256, 64 rows":
            assert kernel["spilled"] <= MASS_SPILLS[capability], kernel
        elif kernel["kernel"].startswith("key basis"):
            assert kernel["spilled"] <= BASIS_SPILLS[capability], kernel
        elif kernel["kernel"].startswith("flat forward"):
            refuse_what_makes_gathers_slow(kernel, capability)
        else:
            assert kernel["spilled"] <= most, kernel
        if kernel["kernel"].startswith("alike"):
            assert kernel["serialised"] == [], kernel
            allowed = next((count for name, count in PASSES.items() if kernel["kernel"].startswith(name)), 0)
            allowed = OPENED_PASSES if kernel["kernel"].endswith("opened") else allowed
            assert kernel["synchronous"] <= allowed, kernel
        if kernel["kernel"].startswith("alike choice"):
            assert kernel["asynchronous"] == BACKGROUND[kernel["kernel"].split()[-1]], kernel
        if kernel["kernel"].startswith("decoding"):
            assert kernel["serialised"] == [], kernel
            # a merge reads each part once, and few
            merges = "merge" in kernel["kernel"] or "best" in kernel["kernel"]
            assert kernel["synchronous"] <= 3 * merges, kernel
        if kernel["kernel"].startswith(("forward", "backward", "keys", "queries")):
            allowed = next((count for name, count in SYNCHRONOUS.items() if kernel["kernel"].startswith(name)), 0)
            assert kernel["synchronous"] <= allowed, kernel


@pytest.mark.heavy
# each compiles for minutes, so that each size is compiled for one capability; default sizes are for both
@pytest.mark.parametrize(("dtype", "dims", "capability"), [("float16", (32, 256), 90), ("float32", (64, 128), 80)], ids=str)
def test_other_sizes_fit(dtype, dims, capability):
    for kernel in compiled(capability, dtype, *dims):
        assert kernel["shared"] <= SHARED[capability], kernel


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sizes", "capability"),
    # one of six for every run
    [((1, 64, 64), 90), pytest.param((1, 64, 64), 80, marks=pytest.mark.heavy)]
    + [
        pytest.param(sizes, capability, marks=pytest.mark.heavy)
        for sizes in ((2, 32, 64), (1, 128, 128))
        for capability in SHARED
    ],
)
def test_feature_kernels_fit_and_spill_nothing(sizes, capability):
    kernels = compiled(capability, "bfloat16", *sizes, program=FEATURES)
    assert len(kernels) == 4 + 3
    for kernel in kernels:
        assert kernel["shared"] <= SHARED[capability], kernel
        assert kernel["spilled"] == 0, kernel
        # with power 2 a thread of a few numbers of a tile's own features waits; those stay in the cache
        assert kernel["synchronous"] <= sizes[0] - 1, kernel


@pytest.mark.heavy
@pytest.mark.parametrize("capability", SHARED)
@pytest.mark.parametrize("sizes", [(1, 128, 128), (2, 32, 64)], ids=str)
def test_feature_kernels_in_float32_fit(sizes, capability):
    for kernel in compiled(capability, "float32", *sizes, program=FEATURES):
        assert kernel["shared"] <= SHARED[capability], kernel
