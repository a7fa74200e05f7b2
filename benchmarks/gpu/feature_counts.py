"""Count what the Triton kernels of attention over features multiply and move, and derive their times on an H100.

    python benchmarks/gpu/feature_counts.py        # a table in Markdown, at once; needs no GPU

Each launch takes the larger of its products at `PEAK` and its bytes at `BANDWIDTH`; operands count once for each program
that has its own, a chunk's state once for each head. The roofline is the larger of all products and of inputs and outputs,
each moved once. Forward is summed launch by launch; backward is the larger of all its products and all its bytes.
"""

from dataclasses import dataclass

from hyperattention.kernels.feature import triton_backward, triton_forward

# operations and bytes in a second: what an H200 multiplied, and what an H100 is made for
PEAK, BANDWIDTH = 790e12, 3.35e12
# operations in a second of the list kernel on an H100
REACHED = 360e12
HEADS, KV_HEADS, VALUE_DIM, BYTES = 32, 8, 64, 2


@dataclass(frozen=True)
class Work:
    """Operations and bytes."""

    flop: float
    moved: float

    def __add__(self, other: "Work") -> "Work":
        return Work(self.flop + other.flop, self.moved + other.moved)

    def seconds(self, rate: float) -> float:
        return max(self.flop / rate, self.moved / BANDWIDTH)


def pairs(chunk: int, tile: int) -> float:
    """Pairs that a row weighs: those of whole tiles, on average."""
    return (chunk + tile) / 2


def count(tokens: int, power: int, features: int) -> tuple[list[Work], list[Work], Work, Work]:
    """Count the launches of the forward and of the backward pass, and what each has to do at least."""
    forward, backward = (x.cut_of(features, VALUE_DIM, BYTES, power) for x in (triton_forward, triton_backward))
    rows, keys, state = tokens * HEADS, tokens * KV_HEADS, features**power * VALUE_DIM
    both, group = features + VALUE_DIM, HEADS // KV_HEADS
    # inputs and a few float32 numbers of each token
    of_row, of_key = rows * (BYTES * both + 12), keys * (BYTES * both + 8)
    chunks = tokens // forward.chunk * KV_HEADS
    scan = Work(0, chunks * state * (4 + BYTES))
    sums = Work(2 * state * keys, of_key + chunks * state * 4)
    reads = of_row + of_key + chunks * state * BYTES * group
    near = 2 * rows * pairs(forward.chunk, forward.tile) * both
    ahead = [sums, scan, Work(2 * state * rows + near, reads)]
    chunks = tokens // backward.chunk * KV_HEADS
    scan = Work(0, chunks * state * (4 + BYTES))
    reads = of_row + of_key + chunks * state * BYTES * group
    # each pair: a product of slope and value, a gradient; for the keys, and for squares, its own product; for the keys a sum
    near = 2 * rows * pairs(backward.chunk, backward.tile)
    back = [
        Work(2 * state * keys, of_key + chunks * state * 4),
        *(scan, Work(2 * state * rows, of_row + chunks * state * 4), scan),
        Work(2 * state * rows + near * (both + (power - 1) * features), reads + rows * BYTES * features),
        Work(4 * state * keys + near * 2 * both, of_row + 2 * of_key + chunks * state * BYTES),
    ]
    least, least_back = of_row + of_key, 2 * (of_row + of_key)
    return ahead, back, Work(sum(x.flop for x in ahead), least), Work(sum(x.flop for x in back), least_back)


def main() -> None:
    """Print the table."""
    share = f"share; at {REACHED / 1e12:.0f} TFLOP/s"
    print(f"| | tokens | forward, FLOP | bytes | time | {share} | backward, FLOP | bytes | time | {share} |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for tokens in (32_768, 131_072):
        for power, features in ((1, 64), (2, 32)):
            ahead, back, least, least_back = count(tokens, power, features)
            total, whole = sum(ahead, Work(0, 0)), sum(back, Work(0, 0))
            time, reached = (sum(x.seconds(rate) for x in ahead) for rate in (PEAK, REACHED))
            roof, behind, slowly = least.seconds(PEAK), whole.seconds(PEAK), whole.seconds(REACHED)
            roof_back = least_back.seconds(PEAK)
            print(
                f"| power {power} | {tokens:,} | {total.flop / 1e12:.2g} T | {total.moved / 1e9:.2g} GB | "
                f"{time * 1e3:.2g} ms | {roof / time:.0%}; {roof / reached:.0%} | "
                f"{whole.flop / 1e12:.2g} T | {whole.moved / 1e9:.2g} GB | "
                f"{behind * 1e3:.2g} ms | {roof_back / behind:.0%}; {roof_back / slowly:.0%} |"
            )


if __name__ == "__main__":
    main()
