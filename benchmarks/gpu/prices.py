"""Estimate what a list of draws for alike queries would cost an H100 in fused kernels: prices, not measurements.

    python benchmarks/gpu/prices.py                       # a few settings at 8k to a million tokens
    python benchmarks/gpu/prices.py 1216:16:8 --tokens 32768

32 query heads on 8 kv heads, width 128, bfloat16, causal. Prices are those of prototypes on one H100: a list kernel of 64
rows takes 7.3 ms for 1,024 slots at 131,072 tokens, of 256 rows 5.9 ms; scores run at 375 TFLOP/s where each key read serves
128 rows or more; 1.2 ms a pass over 2 GB. Masses are written and read once, two bytes each; sorting reads queries twice.
"""

import argparse

from hyperattention import Method, Sinks, Window
from hyperattention.select import DrawAlike

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
GROUP = HEADS // KV_HEADS
# seconds for a slot and token of all heads, in lists of 64 rows and of 256
FEW_ROWS, MANY_ROWS = 7.3e-3 / (1024 * 131_072), 5.9e-3 / (1024 * 131_072)
FLOPS, BYTES = 375e12, 2e9 / 1.2e-3


def price(stage: DrawAlike, tokens: int) -> dict[str, float]:
    """Estimate milliseconds of each part."""
    method = Method(Sinks(16), Window(192), stage, tile=128)
    slots = method.cost(tokens).pairs
    # counted for heads that share no keys; a list serves all heads of a group
    products = stage.selection_pairs(tokens, method.tile, HEAD_DIM, True) / GROUP
    blocks = products * stage.size * GROUP / stage.pooled
    masses = KV_HEADS * tokens / stage.size * blocks
    queries = HEADS * tokens * HEAD_DIM
    seconds = {
        "lists": tokens * slots * (MANY_ROWS if stage.size * GROUP >= 256 else FEW_ROWS),
        "scores": HEADS * tokens * products * 2 * HEAD_DIM / FLOPS,
        "masses": masses * 2 * 2 / BYTES,
        "sorting": queries * 2 * 2 / BYTES,
    }
    return {"pairs": slots, "products": products} | {name: 1e3 * each for name, each in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "stage", nargs="*", default=["1680:16:16", "1216:16:16", "1216:16:8", "1216:16:8:8192", "688:16:8:8192"]
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 16_384, 32_768, 131_072, 1_048_576])
    options = parser.parse_args()
    for text in options.stage:
        stage = DrawAlike(*map(int, text.split(":")))
        print(stage)
        for tokens in options.tokens:
            parts = price(stage, tokens)
            total = sum(parts[name] for name in ("lists", "scores", "masses", "sorting"))
            print(f"  {tokens:>9,} tokens: {total:7.2f} ms = " + ", ".join(f"{name} {x:.4g}" for name, x in parts.items()))


if __name__ == "__main__":
    main()
