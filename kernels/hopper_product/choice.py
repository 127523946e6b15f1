"""Which tile serves a weight and a number of tokens, where this kernel is the fastest one; elsewhere others serve.

Every tile gives the same bits, so a choice is only ever a matter of speed. Measured on an H100 80GB HBM3 by
`benchmarks/gpu_products.py`, beside what cuBLASLt has (`linear/algorithms.py`), for the weights that are named.
"""

import functools
import sys

from triode.kernels.hopper_product.tiles import Ending, ProductTile

MEASURED_SMS = 132
"""Of an H100 SXM or H200. Numbers of tokens and tiles are those that fill so many evenly."""

SPEEDS: dict[ProductTile, int] = {
    ProductTile(consumers=2, subtiles=2, columns=192, num_stages=4): 850,
    ProductTile(consumers=2, subtiles=2, columns=176, num_stages=4): 840,
    ProductTile(consumers=2, subtiles=1, columns=256, num_stages=4, shares_weight=True): 835,
    ProductTile(consumers=2, subtiles=1, columns=224, num_stages=5, shares_weight=True): 815,
    ProductTile(consumers=2, subtiles=2, columns=144, num_stages=4): 810,
    ProductTile(consumers=2, subtiles=1, columns=224, num_stages=5): 770,
    ProductTile(consumers=2, subtiles=1, columns=144, num_stages=4, parts=2): 760,
    ProductTile(consumers=3, subtiles=1, columns=144, num_stages=5): 770,
    ProductTile(consumers=3, subtiles=1, columns=112, num_stages=5): 750,
}
"""TFLOP/s of a cool GPU all of whose multiprocessors have something to do."""

SWIGLU_TOKENS: dict[tuple[int, int], tuple[range, ...]] = {
    # Qwen2.5-7B and Llama-3.1-8B, of whose features cuBLASLt has a tile that 384 tokens fill more evenly.
    (18944, 3584): (range(33, sys.maxsize),),
    (14336, 4096): (range(33, 257), range(385, sys.maxsize)),
}
"""(out features, in features) → the numbers of tokens for which this kernel is the fastest."""


def swiglu_product_serves(num_tokens: int, num_features: int, in_features: int) -> bool:
    """Whether this kernel should serve; the out features are those of one half."""
    return any(num_tokens in served for served in SWIGLU_TOKENS.get((num_features, in_features), ()))


@functools.lru_cache(maxsize=8192)
def swiglu_product_tile(num_tokens: int, num_features: int, num_sms: int) -> ProductTile:
    """The one that should be done first; the out features are those of one half."""

    def cost(tile: ProductTile) -> float:
        num_waves = -(-tile.num_clusters(num_tokens, 2 * num_features) // (num_sms // tile.cluster))
        return num_waves * tile.tokens * tile.rows / SPEEDS[tile]

    return min(SPEEDS, key=cost)


_QWEN_QKV, _QWEN_O, _QWEN_DOWN = (4608, 3584), (3584, 3584), (3584, 18944)
_LLAMA_QKV, _LLAMA_O, _LLAMA_DOWN = (6144, 4096), (4096, 4096), (4096, 14336)
"""Of Qwen2.5-7B and Llama-3.1-8B, as (out features, in features)."""


def _of_one_weight(tokens: int, rows: int, num_stages: int, cluster: int = 2) -> ProductTile:
    """64 tokens for each group of warps, up to two; programs side by side have other tokens."""
    return ProductTile(
        consumers=tokens // 64, subtiles=1, columns=rows, num_stages=num_stages, shares_weight=True, cluster=cluster
    )


_PLAIN: dict[tuple[int, int], dict[int, ProductTile | None]] = {
    _QWEN_DOWN: {224: None, 256: _of_one_weight(64, 128, 9, cluster=4)},
    _LLAMA_QKV: {96: None, 128: _of_one_weight(64, 96, 11), 224: None, 256: _of_one_weight(128, 96, 8)},
    _LLAMA_O: {96: None, 128: _of_one_weight(64, 64, 12)},
    _LLAMA_DOWN: {96: None, 128: _of_one_weight(64, 64, 12)},
}
_ADDED: dict[tuple[int, int], dict[int, ProductTile | None]] = {
    _QWEN_O: {3072: None, 4096: _of_one_weight(128, 224, 5)},
    _LLAMA_O: {3072: None, 4096: _of_one_weight(128, 256, 4)},
}
MEASURED = {Ending.STORE: _PLAIN, Ending.ADD: _ADDED}
"""(out features, in features) → {most tokens: tile, or None where others are faster}, as they are for more tokens."""


@functools.lru_cache(maxsize=8192)
def measured_tile(ending: Ending, num_tokens: int, out_features: int, in_features: int) -> ProductTile | None:
    """The tile that serves a product, or a product that is added; None leaves it to others."""
    by_tokens = MEASURED[ending].get((out_features, in_features), {})
    return next((by_tokens[most] for most in sorted(by_tokens) if num_tokens <= most), None)
