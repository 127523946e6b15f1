"""How the programs of `layer.py` share a layer's weights: a table of what was measured, and for which models it serves.

No choice here changes a bit.

D hidden    E (N + 2 K) H rows of queries, keys and values    F intermediate
"""

import dataclasses

import torch

from triode.kernels.gpu_traits import GpuTraits

STAGE_NUMBERS = 8192
"""Weights that are copied, and taken, at a time."""
ASKED_PLACES = 3
"""Places of the ring that are on their way at a time: what keeps memory busy, and lets others' numbers come soon."""
BLOCK_FEATURES = 64
"""A tensor core's rows: 128 bytes, in which the copy engine swaps parts of 16."""
CHUNK_FEATURES = 1024
"""What is multiplied with weights lies in shared memory in chunks of so many features."""
_OTHER_BYTES = 16 * 1024
"""Of shared memory: sums that rows exchange, what lies behind ring and vector, barriers, and what the compiler adds."""
_MOST_HIDDEN = 4096
_LEAST_MULTIPLE = 16
"""Of a matrix's features: the copy engine's strides, and a tensor core's sums."""
_MOST_CHUNKS = 63
"""Of the longest vector: `vectors.fetch` takes a sum of six powers of two."""


@dataclasses.dataclass(frozen=True)
class Heights:
    """Weight rows of a stage, of each product; as many halves of gates and ups, and of pairs that rotate."""

    o: int
    gate_up: int
    down: int
    qkv: int


MEASURED: dict[tuple[int, int], Heights] = {
    # Qwen2.5-7B, Llama-3.1-8B.
    (3584, 18944): Heights(o=32, gate_up=32, down=32, qkv=64),
    (4096, 14336): Heights(o=32, gate_up=32, down=32, qkv=64),
    # Qwen2.5-0.5B, SmolLM2-135M.
    (896, 4864): Heights(o=32, gate_up=64, down=32, qkv=32),
    (576, 1536): Heights(o=16, gate_up=32, down=16, qkv=32),
}
"""(hidden, intermediate) → heights, where this kernel is faster than one for each product."""


@dataclasses.dataclass(frozen=True)
class LayerSizes:
    """A layer's sizes."""

    hidden: int
    intermediate: int
    num_heads: int
    num_kv_heads: int
    head_dim: int

    @property
    def attended(self) -> int:
        """Features of what attention gives."""
        return self.num_heads * self.head_dim

    @property
    def qkv(self) -> int:
        """Rows of the projection."""
        return self.attended + 2 * self.num_kv_heads * self.head_dim


@dataclasses.dataclass(frozen=True)
class LayerPlan:
    """What the kernel is compiled for."""

    sizes: LayerSizes
    heights: Heights
    widest: int
    """Features of the longest vector, in whole chunks."""
    stages: int

    @property
    def hidden_padded(self) -> int:
        """As `normalise_row` pads it."""
        return _padded(self.sizes.hidden)


def layer_plan(sizes: LayerSizes, dtype: torch.dtype, traits: GpuTraits) -> LayerPlan | None:
    """How the kernel serves layers of this size; None where it does not, or was not measured to be the faster way."""
    heights = MEASURED.get((sizes.hidden, sizes.intermediate))
    if heights is None or not traits.warp_group_products or dtype not in (torch.bfloat16, torch.float16):
        return None
    widest = max(_padded(sizes.hidden), sizes.attended, sizes.intermediate)
    widest = -(-widest // CHUNK_FEATURES) * CHUNK_FEATURES
    stages = (traits.shared_memory_bytes - _OTHER_BYTES - widest * dtype.itemsize) // (STAGE_NUMBERS * dtype.itemsize)
    if stages < ASKED_PLACES or widest > _MOST_CHUNKS * CHUNK_FEATURES or not _divides(sizes, heights):
        return None
    return LayerPlan(sizes, heights, widest, stages)


def _divides(sizes: LayerSizes, heights: Heights) -> bool:
    """Whether every product falls into whole units, and the norm is one that four warps take in `normalise_row`, too."""
    return (
        CHUNK_FEATURES <= _padded(sizes.hidden) <= _MOST_HIDDEN
        and all(size % _LEAST_MULTIPLE == 0 for size in (sizes.hidden, sizes.attended, sizes.intermediate))
        and sizes.hidden % heights.o == 0
        and sizes.hidden % heights.down == 0
        and 2 * sizes.intermediate % heights.gate_up == 0
        and sizes.head_dim % heights.qkv == 0
    )


def _padded(hidden: int) -> int:
    return 1 << (hidden - 1).bit_length()
