"""Compile every Triton kernel for GPUs that are not here, and tell what each takes: run by test_compiled.py as a program.

Needs no driver: a stand-in for it names the architecture. One line of JSON for each kernel.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.runtime import driver

from hyperattention.kernels.choose import (
    triton_alike_blocks,
    triton_alike_first,
    triton_block_mass,
    triton_choose_alike,
    triton_draw_leaves,
    triton_key_basis,
    triton_key_metric,
    triton_open_blocks,
    triton_place,
    triton_prepare,
    triton_represent,
    triton_sort_alike,
    triton_uniform,
)
from hyperattention.kernels.choose.alike_plan import AlikePlan, memory_of
from hyperattention.kernels.choose.operator import scores_alike
from hyperattention.kernels.choose.places import Places
from hyperattention.kernels.decode import triton_coreset, triton_pages, triton_parts, triton_rank
from hyperattention.kernels.decode.page_plan import MOST_PAGES, PagePlan
from hyperattention.kernels.launch import Launch, store_of
from hyperattention.kernels.list import triton_backward as list_triton_backward
from hyperattention.kernels.list import triton_flat, triton_flatten, triton_sorted
from hyperattention.kernels.list import triton_forward as list_triton
from hyperattention.kernels.list.flat_form import FlatForm, FlatLists, flat_form_of
from hyperattention.kernels.list.reference import Lists

TILES, KEYS = 4, 2048
# groups of every kind: first keys, and keys in a run
GROUPS = ((1, 16, True), (1, 256, False), (1, 64, True), (688, 1, False), (8, 16, False))
# the default method's, which are read as they lie, and rows of a tile: lists of alike queries, and those of positions
LYING = {"drawn keys": (64, GROUPS[3:4]), "sinks and window": (512, GROUPS[:3])}
TOOL = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


class Driver:
    """What Triton asks of a driver before it compiles."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


def indices(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int64)


def lists_of(rows: int, groups: tuple[tuple[int, int, bool], ...] = GROUPS, *, labelled: bool = False) -> Lists:
    none, many = indices(0), len(groups)
    firsts = [indices(1, TILES, runs) for runs, _, _ in groups]
    holes = [indices(2, 1, TILES) if size == 16 and runs > 1 else none for runs, size, _ in groups]
    tests = (indices(1, TILES, rows), indices(1, KEYS), *[indices(1, TILES, rows)] * 2) if labelled else (None,) * 4
    return Lists(
        indices(1),
        indices(1, TILES, rows),
        firsts,
        [size for _, size, _ in groups],
        [x.float() for x in firsts],
        [indices(1, TILES)] * many,
        [indices(1, TILES)] * many,
        holes,
        [causal for _, _, causal in groups],
        [labelled] * many,
        *tests,
    )


def launches_of_lists(dtype: torch.dtype, dim: int, rows: int, capability: int) -> Iterator[tuple[str, Launch]]:
    q, k = torch.empty(1, TILES, rows // 64, 64, dim, dtype=dtype), torch.empty(1, KEYS, dim, dtype=dtype)
    lse, lists = torch.empty(1, TILES, rows // 64, 64), lists_of(rows)
    major = capability // 10
    cut = list_triton.shape_of(rows, dim, q.element_size(), major)
    store = store_of(k, None)
    whole, split = (
        (torch.empty(n, *q.shape, dtype=dtype if n == 1 else torch.float32), torch.empty(n, *lse.shape)) for n in (1, 4)
    )
    yield "forward", list_triton.launch_forward(q, store, store, whole, lists, 0.1, cut)
    yield "forward, split", list_triton.launch_forward(q, store, store, split, lists, 0.1, cut)
    yield "forward, hashed", list_triton.launch_forward(q, store, store, whole, lists_of(rows, labelled=True), 0.1, cut)
    store = store_of(torch.empty(8, 1, 256, dim, dtype=dtype), torch.zeros(1, 8, dtype=torch.int32))
    yield "forward, paged", list_triton.launch_forward(q, store, store, split, lists, 0.1, cut)
    grads, saved, results = (q, lse), (q, k, k, q, lse), (q, k.float(), k.float())
    cuts = list_triton_backward.cuts_of(q, k, major)
    for name, each in (("", lists), (", hashed", lists_of(rows, labelled=True))):
        queries, keys = list_triton_backward.launches_backward(grads, saved, results, each, 0.1, cuts)
        if not name:
            yield "backward, queries", queries
        yield f"backward, keys{name}", keys


def launches_of_flat_lists(dtype: torch.dtype, dim: int, rows: int, capability: int) -> Iterator[tuple[str, Launch]]:
    form = flat_form_of(lists_of(rows), KEYS, paged=False)
    flat = triton_flatten.empty_flat(form)
    yield "flatten", triton_flatten.launch_flatten(form, flat)
    yield "flat forward", flat_launch(dtype, dim, rows, capability, form, flat)


def launches_of_lists_as_they_lie(dtype: torch.dtype, dim: int, capability: int) -> Iterator[tuple[str, Launch]]:
    for name, (rows, groups) in LYING.items():
        form = flat_form_of(lists_of(rows, groups), KEYS, paged=False)
        assert not form.to_lay_out
        yield f"flat forward, {name}", flat_launch(dtype, dim, rows, capability, form, None)


def flat_launch(
    dtype: torch.dtype, dim: int, rows: int, capability: int, form: FlatForm, flat: FlatLists | None
) -> Launch:  # fmt: skip
    size = min(rows, 64)
    q, k = torch.empty(1, TILES, rows // size, size, dim, dtype=dtype), torch.empty(1, KEYS, dim, dtype=dtype)
    results = torch.empty(1, rows // size, TILES, size, dim, dtype=dtype), torch.empty(1, rows // size, TILES, size)
    cut, store = triton_flat.flat_shape_of(rows, dim, q.element_size(), capability // 10), store_of(k, None)
    return triton_flat.launch_flat(q, store, store, results, form, flat, 0.1, cut, carry=triton_flat.carries(cut))


def launches_of_masses(dtype: torch.dtype, dim: int, rows: int) -> Iterator[tuple[str, Launch]]:
    query, edges, lse = torch.empty(1, TILES, rows, dim, dtype=dtype), indices(1, TILES, 5), torch.empty(1, TILES, rows)
    yield "block lse", triton_block_mass.launch_lse(query, torch.empty(1, 9, 2 * dim, dtype=dtype), edges, lse, 9, 256)
    for first, mass, size, kinds in (
        (None, torch.empty(1, TILES, 9), 256, (2, 4)),
        (indices(1, TILES, 384), torch.empty(1, TILES, 384), 16, (1, 3)),
    ):
        summary = torch.empty(1, 2304 // size, sum(kinds), dim, dtype=dtype)
        launch = triton_block_mass.launch_mass(query, summary, first, edges, lse, mass, size, 2, kinds)
        yield f"block mass, blocks of {size}", launch


def launches_of_preparation(dtype: torch.dtype, dim: int) -> Iterator[tuple[str, Launch]]:
    k, middle = torch.empty(2, KEYS, dim, dtype=dtype), torch.empty(2, 1, dim)
    basis = torch.empty(2, dim, 64) if dim > 64 else None
    width = min(dim, 64)
    basis_of = torch.empty(2, 1, dim), torch.empty(2, dim, width if dim > 64 else 0)
    yield "key basis", triton_key_basis.launch_basis(k, basis_of, 688, 4, 7)
    yield "keys prepared", triton_prepare.launch_keys(k, middle, basis, torch.empty(2, KEYS, width))
    for group in (1, 4, 8):
        q, pools = torch.empty(1, 2 * group, KEYS, dim, dtype=dtype), torch.empty(2, TILES, 16 * group, width, dtype=dtype)
        yield f"queries of {group} heads pooled", triton_prepare.launch_queries(q, basis, pools, 0, 64, 4, 0, 2, 0.1)


def launches_of_draws() -> Iterator[tuple[str, Launch]]:
    for leaves, closed in ((1024, 896), (1280, 1152), (128, 0)):
        edges, noise = indices(1, TILES, 5), torch.zeros(1, TILES, dtype=torch.float64)
        levels, sizes = [(indices(1, TILES, leaves - closed), edges, edges)], [1]
        # the finer level first; the coarser one is that of all leading blocks
        for count, size, listed in ((closed // 3 * 2, 16, True), (closed // 3, 256, False)) if closed else ():
            first, alive = indices(1, TILES, count) if listed else None, torch.zeros(1, TILES, count, dtype=torch.uint8)
            levels, sizes = [*levels, (first, torch.empty(1, TILES, count), alive)], [*sizes, size]
        results, given = (indices(1, TILES, 688), torch.empty(1, TILES, 688)), (leaves - closed, edges, noise)
        launch = triton_draw_leaves.launch_draw(levels, sizes, *given, results, 0.2, 2, 1e-30, final=True)
        yield f"draws from {leaves} leaves", launch
    for blocks, keep, size, child in ((256, 32, 4096, 256), (512, 24, 256, 16), (384, 8, 16, 1)):
        mass, alive = torch.empty(1, TILES, blocks), torch.zeros(1, TILES, blocks, dtype=torch.uint8)
        first = None if size == 4096 else indices(1, TILES, blocks)
        results = alive, indices(1, TILES, keep * size // child)
        launch = triton_open_blocks.launch_open(mass, first, indices(1, TILES, 5), results, size, keep, 2, KEYS, child)
        yield f"opened blocks of {size}", launch
    keys, among = torch.empty(2, 8192, 64), None
    for size, means, far in ((16, 1, 3), (256, 2, 4), (4096, 4, 8)):
        shape, kind = (2, 8192 // size), torch.bfloat16
        summary, moments = (
            torch.empty(*shape, means + far, 64, dtype=kind),
            torch.empty(*shape, 128 if size > 16 else 0, dtype=kind),
        )
        results = summary, torch.empty(*shape, far, 64), moments
        yield f"representatives of {size}", triton_represent.launch_represent(keys, among, results, size, means)
        among = results[1]
    yield "counted noise", triton_uniform.launch_counted(torch.empty(64, dtype=torch.float64), 7)
    yield "noise", triton_uniform.launch_uniform(None, indices(TILES), torch.empty(1, 2, TILES, dtype=torch.float64), 7, 0)


def launches_of_alike_choice(dtype: torch.dtype, dim: int) -> Iterator[tuple[str, Launch]]:
    # lists of 64 rows out of tiles of 128 positions and four heads
    q, many, rows = torch.empty(1, 8, KEYS, dim, dtype=dtype), 8, TILES * 8
    estimate = torch.bfloat16 if dtype == torch.float32 else dtype
    given = q, indices(2, rows, 64), torch.empty(2, TILES, 16, dim, dtype=dtype), indices(2, TILES, 5)
    noise = torch.empty(2, rows, dtype=torch.float64)
    results = indices(2, rows, 640), torch.empty(2, rows, 640), indices(2, rows), indices(2, rows)
    for groups in (groups for groups in (8, 16) if scores_alike(groups, dim)):
        # keys alone, and blocks that are opened twice; each takes long to compile
        for kind, levels in (("keys", 1), ("opened", 3)):
            if groups == 8 and kind != "opened":
                continue
            plan = AlikePlan(128, 0, TILES, TILES, KEYS, KEYS // 16, levels, many, groups, 2, 4, 256, 3, 1)
            memory = memory_of(plan, q, 2, TILES, estimate)
            keys = torch.empty(2, plan.blocks, dim, dtype=estimate)
            of_keys = keys, keys[:, KEYS:].contiguous(), torch.empty(2, plan.blocks, dtype=estimate)
            launch = triton_choose_alike.launch_choice(
                (*given, noise), of_keys, results, memory, plan, 0.1, 2.0, 1e9, 0.1, 1e-30
            )
            yield f"alike choice, {groups} groups, {kind}", launch


def launches_of_alike_sorting(dtype: torch.dtype, dim: int) -> Iterator[tuple[str, Launch]]:
    begin = torch.empty(dim, 16)
    for group, parts in ((1, 1), (4, 1), (8, 2)):
        # lists of 64 rows out of tiles of 128 positions; sixteen heads in two parts
        q, many = torch.empty(1, 2 * parts * group, KEYS, dim, dtype=dtype), 2 * group
        limit, source = indices(1, TILES, 128), indices(2, TILES * parts * many, 64)
        live, directions = torch.zeros_like(source, dtype=torch.bool), torch.empty(2, TILES * parts, 16, dim, dtype=dtype)
        results = source, live, indices(*source.shape), indices(*source.shape), directions
        metric = torch.empty(2, 3, dim, dim), indices(2, TILES, 5)
        launch = triton_sort_alike.launch_sort(q, begin, metric, limit, results, 0, 0, 0.1, 4, 2, (640, 4))
        yield f"alike sorting, {group} heads{' of 16' if parts > 1 else ''}", launch


def launches_of_alike_keys(dtype: torch.dtype, dim: int) -> Iterator[tuple[str, Launch]]:
    k, centres = torch.empty(2, KEYS, dim, dtype=dtype), torch.empty(2, 2 * dim + 1)
    estimate = torch.bfloat16 if dtype == torch.float32 else dtype
    noise = torch.empty(2, TILES * 8, dtype=torch.float64)
    results = centres, torch.empty(dim, 16), noise, indices(2)
    yield "alike first", triton_alike_first.launch_first(k, k, indices(TILES), None, results, 640, 2, (7, 2**32 - 5))
    factors = triton_key_metric.launches_of_factors(k, centres, torch.empty(2, 3, dim, dim), 640, 4, 1e-6)
    yield from zip(("alike products of keys", "alike factors of keys"), factors, strict=True)
    keys = torch.empty(2, KEYS + KEYS // 4, dim, dtype=estimate)
    results = keys, keys[:, KEYS:].contiguous(), torch.empty(keys.shape[:2], dtype=estimate)
    yield "alike blocks", triton_alike_blocks.launch_blocks(k, k, centres, results, 2, 2.0)


def launches_of_sorted_rows(dtype: torch.dtype, dim: int) -> Iterator[tuple[str, Launch]]:
    x, rows, lse = (
        torch.empty(1, 8, KEYS, dim, dtype=dtype),
        torch.empty(2, 8, 64, dim, dtype=dtype),
        torch.empty(1, 8, KEYS),
    )
    source, live, of_rows = indices(2, 8, 64), torch.zeros(2, 8, 64, dtype=torch.bool), torch.empty(2, 8, 64)
    for back in (False, True):
        yield f"rows {'brought back' if back else 'sorted'}", triton_sorted.launch_move(x, rows, source, live, back=back)
    yield "rows merged", triton_sorted.launch_merge(x, lse, (rows, of_rows), source, live, (x, lse))
    results = x, lse, rows, of_rows
    places = source, live
    yield "rows merged, gradient", triton_sorted.launch_merge_backward((x, lse), x, lse, (rows, of_rows), places, results)


def launches_of_places() -> Iterator[tuple[str, Launch]]:
    places = Places(1, 2, 4, TILES, 128, 0, 0, 128 * TILES, KEYS, TILES, TILES, 16, 192, 0, True, True)
    results = indices(10, 2, TILES), indices(2, TILES, 5), torch.empty(2, TILES, 1), indices(2, TILES, 512)
    for rank in (None, indices(1, KEYS)):
        launch = triton_place.launch_place(places, rank, (*results, indices(TILES), indices(2)))
        yield "places" if rank is None else "places, masked keys", launch


def launches_of_decoding(dtype: torch.dtype, dim: int) -> Iterator[tuple[str, Launch]]:
    # as stores hold them, in buffers longer than what is used; 32 heads on 8, and one query
    q, k = torch.empty(1, 32, 1, dim, dtype=dtype), torch.empty(1, 8, KEYS, dim, dtype=dtype)
    results, parts = triton_parts.empty_results(q, dim, 16)
    cut, large = (triton_parts.decode_shape_of(rows, dim, q.element_size()) for rows in (4, 64))
    weight = torch.empty(1, 8, KEYS)
    given = q, k, k, weight, None, None
    yield "decoding, coreset", triton_coreset.launch_coreset(given, parts, 0.1, cut, causal=False, softcap=None)
    many = torch.empty(1, 32, 16, dim, dtype=dtype)
    _, wide = triton_parts.empty_results(many, dim, 1)
    given = many, k, k, weight, indices(8), torch.empty(32)
    yield "decoding, coreset, 64 rows", triton_coreset.launch_coreset(given, wide, 0.1, large, causal=True, softcap=30.0)
    yield "decoding, merge", triton_parts.launch_merge(parts, results)
    for pages in (KEYS // 8, MOST_PAGES):
        summary = torch.empty(1, 8, pages, 2 * dim, dtype=dtype)
        scores, plan = triton_rank.empty_scores(q, 8, pages), PagePlan(8, 16, pages * 8, pages * 8 + 64, 64)
        if pages == MOST_PAGES:
            yield "decoding, page scores", triton_rank.launch_rank(q, summary, scores, 0.1, 0.5, None)
        of_pages, chosen = (q, k, k, indices(1), None), indices(8, 1, 64).int()
        launch = triton_pages.launch_pages(of_pages, scores, chosen, parts, results, plan, 0.1, cut, softcap=None)
        yield f"decoding, best of {pages} pages", launch
    launch = triton_pages.launch_pages(of_pages, None, chosen, parts, None, plan, 0.1, cut, softcap=None)
    yield "decoding, chosen pages", launch


def resources_of(compiled, capability: int) -> dict:
    """Registers, bytes of stack (what did not fit registers is spilled there), serialised products, and how loops gather."""
    with tempfile.TemporaryDirectory() as folder:
        cubin, ptx = Path(folder) / "kernel.cubin", Path(folder) / "kernel.ptx"
        cubin.write_bytes(compiled.asm["cubin"])
        ptx.write_text(compiled.asm["ptx"])
        listing = subprocess.run([TOOL, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True)
        # Triton throws away what the assembler says: it is asked again
        name = f"sm_{capability}{'a' if capability >= 90 else ''}"
        command = [get_ptxas(capability).path, f"--gpu-name={name}", ptx, "-o", Path(folder) / "again.cubin"]
        said = subprocess.run(command, capture_output=True, text=True, check=True)
    found = dict(re.findall(r"(REG|STACK):(\d+)", listing.stdout))
    return {
        "registers": int(found["REG"]), "spilled": int(found["STACK"]), "shared": compiled.metadata.shared,
        # C7510 to C7515: products that wait for one another
        "serialised": sorted(set(re.findall(r"\((C751\d)\)", said.stdout + said.stderr))),
        **gathers_of(compiled.asm["ttgir"]),
    }  # fmt: skip


def gathers_of(ttgir: str) -> dict[str, int]:
    """Count blocks of keys or values that loops fetch: in the background, or with everything waiting."""
    counts, loops = {"asynchronous": 0, "synchronous": 0}, []
    for line in ttgir.splitlines():
        indent = len(line) - len(line.lstrip())
        if loops and line.lstrip().startswith("}") and indent <= loops[-1]:
            loops.pop()
        if not loops and "scf.for" not in line:
            continue
        if "scf.for" in line:
            loops.append(indent)
        # tensors of two axes: numbers of keys, and weights, have one
        if re.search(r"ttg\.async_copy_global_to_local .* tensor<\d+x\d+x!tt\.ptr", line):
            counts["asynchronous"] += 1
        if re.search(r"tt\.load .* tensor<\d+x\d+x!tt\.ptr", line):
            counts["synchronous"] += 1
    return counts


def launches(capability: int, dtype: torch.dtype, dim: int) -> Iterator[tuple[str, Launch]]:
    """Every kernel at the default sizes, those of lists at others; what projects to 64 numbers needs no second width."""
    default = dtype == torch.bfloat16
    for rows in (64, 256) if default else (256,):
        for name, launch in launches_of_lists(dtype, dim, rows, capability):
            yield f"{name}, {rows} rows", launch
    for rows in (16, 64, 128, 256) if default else (256,):
        for name, launch in launches_of_flat_lists(dtype, dim, rows, capability):
            yield f"{name}, {rows} rows", launch
    yield from launches_of_lists_as_they_lie(dtype, dim, capability)
    if default:
        yield from launches_of_preparation(dtype, dim)
    yield from launches_of_alike_choice(dtype, dim)
    yield from launches_of_decoding(dtype, dim)
    yield from launches_of_sorted_rows(dtype, dim)
    yield from launches_of_alike_sorting(dtype, dim)
    yield from launches_of_alike_keys(dtype, dim)
    if default and dim == 64:
        for rows in (16, 64, 256):
            for name, launch in launches_of_masses(dtype, dim, rows):
                yield f"{name}, {rows} rows", launch
        yield from launches_of_draws()
        yield from launches_of_places()


def main(capability: int, dtype: torch.dtype, dims: list[int]) -> None:
    driver.set_active(Driver(capability))
    for dim in dims:
        for name, launch in launches(capability, dtype, dim):
            print(json.dumps({"kernel": name, "dim": dim, **resources_of(launch.compile(), capability)}), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), getattr(torch, sys.argv[2]), [int(x) for x in sys.argv[3:]])
