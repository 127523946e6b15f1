"""The memory that keys and values live in, and how much of it there can be.

Shape letters: L layers, P blocks, B tokens a block, K KV heads, H elements of a head.
"""

from collections.abc import Sequence

import torch

from triode.cache.config import CacheConfig
from triode.cache.memory import available_memory_bytes
from triode.cache.messages import BlockCopy
from triode.errors import InsufficientMemory
from triode.kernels.native.numa import bound_nodes


class KVPool:
    """Keys and values of all layers in one allocation, cut into blocks.

    `keys[l]` and `values[l]` are the views of layer `l`, each [P, B, K, H]; H is `elements_per_head`. Token `i` of a
    sequence lives at `[table[i // B], i % B]`; the compiled step keeps blocks whole and orders each in its own way
    (kernels/native/kv.h). The memory starts uninitialised and blocks are reused as they are:
    whoever reads must mask positions that no token of the sequence has written (NaN times a weight of zero is NaN).
    """

    def __init__(
        self,
        num_blocks: int,
        *,
        block_size_tokens: int,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size_tokens = block_size_tokens
        # Axis 1 tells keys (0) from values (1).
        elements = elements_per_head(head_dim, dtype)
        shape = (num_layers, 2, num_blocks, block_size_tokens, num_kv_heads, elements)
        self._storage_L2PBKH = torch.empty(shape, dtype=dtype, device=device)
        self.keys = tuple(layer_2PBKH[0] for layer_2PBKH in self._storage_L2PBKH)
        self.values = tuple(layer_2PBKH[1] for layer_2PBKH in self._storage_L2PBKH)

    @property
    def num_bytes(self) -> int:
        """Size of the allocation."""
        return self._storage_L2PBKH.nbytes

    def copy(self, copies: Sequence[BlockCopy]) -> None:
        """Copy whole blocks, keys and values of all layers. All sources are read before any target is written."""
        if not copies:
            return
        device = self._storage_L2PBKH.device
        sources = torch.tensor([copy.source for copy in copies], device=device)
        targets = torch.tensor([copy.target for copy in copies], device=device)
        self.copy_blocks(sources, targets)

    def copy_blocks(self, sources: torch.Tensor, targets: torch.Tensor) -> None:
        """The same for block numbers that are on the pool's device already."""
        self._storage_L2PBKH[:, :, targets] = self._storage_L2PBKH[:, :, sources]


def elements_per_head(head_dim: int, dtype: torch.dtype) -> int:
    """Elements of `dtype` that one head of one token takes.

    As int8 they are the numbers, zeros up to a multiple of 4, and the 4 bytes of the float32 that multiplies them
    (kernels/native/kv.h).
    """
    return -(-head_dim // 4) * 4 + 4 if dtype == torch.int8 else head_dim


def bytes_per_block(
    *, block_size_tokens: int, num_layers: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype
) -> int:
    """Bytes that one block takes in all layers, keys and values together."""
    return 2 * num_layers * block_size_tokens * num_kv_heads * elements_per_head(head_dim, dtype) * dtype.itemsize


def num_blocks_for(config: CacheConfig, bytes_per_block: int, free_bytes: int, useful_blocks: int) -> int:
    """How many blocks the pool gets, block 0 (for padding) included.

    `kv_cache_bytes` is taken as it stands. Without it the pool takes `kv_cache_fraction` of `free_bytes`, and no more than
    `useful_blocks`, which is what the engine's limits let requests fill.

    Raises InsufficientMemory when `kv_cache_bytes` is more than is free, or when not even one block of tokens fits.
    """
    if config.kv_cache_bytes is None:
        budget_bytes = int(free_bytes * config.kv_cache_fraction)
        num_blocks = min(budget_bytes // bytes_per_block, useful_blocks + 1)
        origin = f"{config.kv_cache_fraction:g} (kv_cache_fraction) of the {_gib(free_bytes)} that are free"
    else:
        budget_bytes = config.kv_cache_bytes
        num_blocks = budget_bytes // bytes_per_block
        origin = "kv_cache_bytes"
    if budget_bytes > free_bytes:
        raise InsufficientMemory(
            f"the KV cache wants {_gib(budget_bytes)} (kv_cache_bytes), but {_gib(free_bytes)} are free: "
            "lower kv_cache_bytes, or close what else holds memory (another engine?)"
        )
    if num_blocks < 2:
        raise InsufficientMemory(
            f"the KV cache gets {_gib(budget_bytes)} ({origin}), but needs {_gib(2 * bytes_per_block)} for a block of "
            f"{config.block_size_tokens} tokens and one for padding: lower block_size_tokens, raise kv_cache_bytes or "
            "kv_cache_fraction, or take a smaller model or dtype"
        )
    return num_blocks


def free_memory_bytes(device: torch.device) -> int:
    """Bytes that can still be allocated on `device`: of the GPU, or of main memory within the control group's limit, and of
    the memory nodes that this thread is bound to."""
    if device.type == "cuda":
        # Blocks that torch has cached but does not use are free to us, and unknown to the driver.
        cached_bytes = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached_bytes
    return available_memory_bytes(nodes=bound_nodes())


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.3g} GiB"
