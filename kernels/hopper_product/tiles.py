"""Which tile `product.cu` is compiled with, for a weight and a number of tokens: what each of them computes in a
microsecond, and how often all of the GPU takes one.

Every tile gives the same bits, so a choice is only ever a matter of speed. Measured on an H100 80GB HBM3 by
`benchmarks/gpu_swiglu.py`, for the weights of MEASURED; all others are left to cuBLASLt and the SwiGLU kernel.
"""

import dataclasses
import functools
import sys

CLUSTER = 2
"""Programs that share what both of them read."""
STEP_FEATURES = 64
"""In features of a stage: rows of 128 bytes."""
_WARP_GROUP_THREADS = 128
_INSTRUCTION_TOKENS = 64
_MOST_COLUMNS = 256
_ATOM_BYTES = 1024
MOST_SHARED_BYTES = 227 * 1024
_BARRIER_BYTES = 16


@dataclasses.dataclass(frozen=True)
class ProductTile:
    """The share of one program, and who does what in it."""

    consumers: int
    """Warp groups that multiply; one more has the copy engine fetch."""
    subtiles: int
    """Times 64 tokens, that each of them takes."""
    columns: int
    """Weight rows of an instruction, eight gates and their eight ups by turns."""
    num_stages: int
    """Of shared memory, each 64 in features long."""
    parts: int = 1
    """Instructions side by side."""
    shares_weight: bool = False
    """Whether the programs of a cluster have the same weight rows, or the same tokens."""

    def __post_init__(self) -> None:
        if self.columns % 16 or self.columns > _MOST_COLUMNS:
            raise ValueError(f"columns must be a multiple of 16 up to {_MOST_COLUMNS}, got {self.columns}")
        if self.shares_weight and self.features // 8 % CLUSTER:
            raise ValueError(f"features must be a multiple of 16 where weights are shared, got {self.features}")
        if self.shared_bytes + self.num_stages * _BARRIER_BYTES > MOST_SHARED_BYTES:
            raise ValueError(f"shared memory must be at most {MOST_SHARED_BYTES} bytes, got {self.shared_bytes}")

    @property
    def tokens(self) -> int:
        """Of a program."""
        return _INSTRUCTION_TOKENS * self.subtiles * self.consumers

    @property
    def rows(self) -> int:
        """Weight rows of a program."""
        return self.parts * self.columns

    @property
    def features(self) -> int:
        """Out features of a program."""
        return self.rows // 2

    @property
    def cluster_tokens(self) -> int:
        """Of both programs of a cluster."""
        return self.tokens * (CLUSTER if self.shares_weight else 1)

    @property
    def cluster_features(self) -> int:
        """The same in out features."""
        return self.features * (1 if self.shares_weight else CLUSTER)

    @property
    def num_threads(self) -> int:
        """Of a program."""
        return _WARP_GROUP_THREADS * (1 + self.consumers)

    @property
    def shared_bytes(self) -> int:
        """What stages take, and their alignment."""
        return (self.tokens + self.rows) * STEP_FEATURES * 2 * self.num_stages + _ATOM_BYTES

    def num_clusters(self, num_tokens: int, num_features: int) -> int:
        """Tiles of a cluster that a product has."""
        return -(-num_tokens // self.cluster_tokens) * -(-num_features // self.cluster_features)


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

MEASURED: dict[tuple[int, int], tuple[range, ...]] = {
    # Qwen2.5-7B and Llama-3.1-8B, of whose features cuBLASLt has a tile that 384 tokens fill more evenly.
    (18944, 3584): (range(33, sys.maxsize),),
    (14336, 4096): (range(33, 257), range(385, sys.maxsize)),
}
"""(out features, in features) → the numbers of tokens for which this kernel is the fastest."""


def is_fastest(num_tokens: int, num_features: int, in_features: int) -> bool:
    """Whether this kernel should serve; the out features are those of one half."""
    return any(num_tokens in served for served in MEASURED.get((num_features, in_features), ()))


@functools.lru_cache(maxsize=8192)
def product_tile(num_tokens: int, num_features: int, num_sms: int) -> ProductTile:
    """The one that should be done first; the out features are those of one half."""

    def cost(tile: ProductTile) -> float:
        num_waves = -(-tile.num_clusters(num_tokens, num_features) // (num_sms // CLUSTER))
        return num_waves * tile.tokens * tile.rows / SPEEDS[tile]

    return min(SPEEDS, key=cost)
