"""Compile the Triton kernels of attention over features, as compile_kernels.py does the others; test_compiled.py runs it.

python tests/compile_feature_kernels.py 90 bfloat16 1 64 64     # power, features, numbers of a value
"""

import json
import sys
from collections.abc import Iterator

import torch

from compile_kernels import KEYS, Driver, driver, resources_of
from hyperattention.kernels.feature import triton_backward, triton_forward, triton_states
from hyperattention.kernels.launch import Launch


def launches(dtype: torch.dtype, features: int, dim: int, power: int) -> Iterator[tuple[str, Launch]]:
    """The feature kernels: four heads on one, causal."""
    sizes, name = (features, dim, dtype.itemsize, power), f"power {power}, {features} features"
    forward, backward = triton_forward.cut_of(*sizes), triton_backward.cut_of(*sizes)
    keys, rows = (
        triton_states.Side(
            torch.empty(lists, KEYS, features, dtype=dtype), torch.empty(lists, KEYS, dim, dtype=dtype),
            torch.empty(lists, KEYS), torch.zeros(lists, KEYS), 0,
        )
        for lists in (1, 4)
    )  # fmt: skip
    for side, group, cut, which in ((keys, 1, forward, "forward"), (rows, 4, backward, "backward")):
        results = triton_states.empty_states(side, group, cut, power, group > 1)
        sums, scan, _ = triton_states.launches_states(side, group, cut, power, group > 1, results)
        yield f"states, {which}, {name}", sums
        yield f"scan, {which}, {name}", scan
        if group == 1:
            read = torch.empty(4, KEYS, dim, dtype=dtype), torch.empty(4, KEYS)
            base = torch.empty(1, KEYS)
            launch = triton_forward.launch_forward(
                rows.features, rows.log_scale, base, side, results[0], read, 4, 0, power, cut
            )
            yield f"forward, {name}", launch
        grad, total = (torch.empty_like(x, dtype=torch.float32) for x in (rows.features, rows.values))
        groups, other = ((4, 1), rows) if group == 1 else ((1, 4), keys)
        found = (grad, None, None) if group == 1 else (grad, total, torch.empty(1, KEYS))
        launch = triton_backward.launch_slopes(other, side, results[0], found, groups, True, power, backward)
        yield f"slopes, {'queries' if group == 1 else 'keys'}, {name}", launch


def main(capability: int, dtype: torch.dtype, power: int, features: int, dim: int) -> None:
    driver.set_active(Driver(capability))
    for name, launch in launches(dtype, features, dim, power):
        print(json.dumps({"kernel": name, "dim": dim, **resources_of(launch.compile(), capability)}), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), getattr(torch, sys.argv[2]), *map(int, sys.argv[3:6]))
