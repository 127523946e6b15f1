"""Paged attention on an NVIDIA GPU: `attend.py` has the kernel and the idea, `tiles.py` the sizes.

Rows of many query tokens have a kernel of their own on Hopper, `hopper.py`, with the same bits. Where programs share a row's
KV, it leaves the states of all segments to another one, which merges them.

T packed query tokens    R rows of the batch    N query heads    K KV heads    H head dim    P blocks    B block size
C blocks in a table      W programs (query tile, KV head)    S segments      M (query token, head) pairs of a program
"""

import dataclasses
import functools
import math
from typing import TypeAlias

import torch
import triton
import triton.language as tl
from triton.experimental.gluon.language import NVMMASharedLayout
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from triode.kernels.device_code import dot_dtype
from triode.kernels.gpu_traits import GpuTraits
from triode.kernels.paged_attention.attend import attend
from triode.kernels.paged_attention.hopper import attend_long_rows
from triode.kernels.paged_attention.states import merge_long_rows
from triode.kernels.paged_attention.tiles import (
    HOPPER_PAIRS,
    HOPPER_STAGES,
    MERGED_AHEAD,
    MERGED_PAIRS,
    SEGMENT_TOKENS,
    TILE_TOKENS,
    AttentionTile,
    decode_tile,
    hopper_serves,
    merge_stages,
    prefill_tile,
)

KV_AS_STORED = 0
"""`KV_MODE` of float32, float16, bfloat16 and float8 pools: an element is its own value."""


@dataclasses.dataclass(frozen=True)
class AttentionWorkspace:
    """Where programs that share a row's KV leave their segments' states. Serves every layer of one stream in turn."""

    state_WSM2: torch.Tensor
    """float32: maximum and sum."""
    partial_WSMH: torch.Tensor
    """float32: accumulators."""
    arrivals_W: torch.Tensor
    """int32: how many programs have finished; every launch leaves it zero."""

    @classmethod
    def allocate(
        cls, num_programs: int, max_segments: int, num_pairs: int, head_dim: int, device: torch.device
    ) -> "AttentionWorkspace":
        """A workspace for launches of at most `num_programs` programs of `num_pairs` pairs each.

        A decode row has one program for each KV head, with as many pairs as query heads share it.
        """
        states = (num_programs, max_segments, num_pairs)
        return cls(
            state_WSM2=torch.empty(*states, 2, dtype=torch.float32, device=device),
            partial_WSMH=torch.empty(*states, head_dim, dtype=torch.float32, device=device),
            arrivals_W=torch.zeros(num_programs, dtype=torch.int32, device=device),
        )


def paged_attention(
    q_TNH: torch.Tensor,
    key_PBKH: torch.Tensor,
    value_PBKH: torch.Tensor,
    block_table_RC: torch.Tensor,
    query_start_R1: torch.Tensor,
    start_R: torch.Tensor,
    out_TNH: torch.Tensor,
    *,
    scale: float,
    max_query_tokens: int,
    traits: GpuTraits,
    window_tokens: int = 0,
    num_splits: int = 1,
    workspace: AttentionWorkspace | None = None,
    tile: AttentionTile | None = None,
) -> None:
    """Attend from every query token to its row's KV, its own included, and write `out_TNH`.

    Row r's query tokens are `query_start[r]:query_start[r + 1]`, at positions from `start[r]` on; their keys and
    values are in the pool already. Nothing is read back from the device.

    Args:
        q_TNH: may be a view whose token stride is not N * H.
        key_PBKH: contiguous, like `value_PBKH`; float32, float16, bfloat16 or float8_e4m3fn.
        block_table_RC: int32; entries past a row's last block are never read.
        query_start_R1: int32, R + 1 entries.
        start_R: int32.
        max_query_tokens: no row has more query tokens; T when nothing better is known.
        window_tokens: a token sees itself and the `window_tokens - 1` before it; 0 means everything before it.
        num_splits: programs that share one row's KV; more than 1 needs a workspace.
        tile: for measuring; None takes the one that suits `max_query_tokens`.

    Raises:
        ValueError: shapes, strides or types do not fit together, or the workspace is too small.
    """
    _check_pool(q_TNH, key_PBKH, value_PBKH, traits)
    rows = (block_table_RC, query_start_R1, start_R)
    launch = _Launch(q_TNH, key_PBKH, value_PBKH, rows, out_TNH, scale, window_tokens, traits)
    if tile is None:
        small = decode_tile(launch.group, q_TNH.shape[2], key_PBKH.dtype, traits)
        long_rows = max_query_tokens > small.pairs // launch.group
        if long_rows and hopper_serves(q_TNH, key_PBKH, traits):
            launch.attend_long_rows(num_splits, workspace)
            return
        tile = prefill_tile(launch.group, q_TNH.shape[2], q_TNH.dtype, traits) if long_rows else small
    launch.attend(tile, max_query_tokens, num_splits, workspace)


_States: TypeAlias = tuple[torch.Tensor, torch.Tensor, int, int]
"""Of a workspace: states, partial sums, and how many segments and pairs it has of each."""


@dataclasses.dataclass(frozen=True)
class _Launch:
    """What every kernel of attention is told. `rows` are block tables, query starts and starts."""

    q_TNH: torch.Tensor
    key_PBKH: torch.Tensor
    value_PBKH: torch.Tensor
    rows: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    out_TNH: torch.Tensor
    scale: float
    window_tokens: int
    traits: GpuTraits

    @property
    def num_rows(self) -> int:
        return len(self.rows[2])

    @property
    def num_kv_heads(self) -> int:
        return self.key_PBKH.shape[2]

    @property
    def group(self) -> int:
        """Query heads of one KV head."""
        return self.q_TNH.shape[1] // self.num_kv_heads

    @property
    def scalars(self) -> tuple[float, int, int]:
        """The scale with log2(e), and the strides of a token's queries and outputs."""
        return self.scale * math.log2(math.e), self.q_TNH.stride(0), self.out_TNH.stride(0)

    def num_tiles(self, query_tokens: int) -> int:
        """How many tiles of so many query tokens there may be: each row's last one need not be full."""
        return len(self.q_TNH) // query_tokens + self.num_rows

    def attend(
        self, tile: AttentionTile, max_query_tokens: int, num_splits: int, workspace: AttentionWorkspace | None
    ) -> None:
        """The kernel of every GPU: a program for each query tile, KV head and share of the KV."""
        head_dim, query_tokens = self.q_TNH.shape[2], tile.pairs // self.group
        long_rows = max_query_tokens > query_tokens
        num_tiles = self.num_tiles(query_tokens) if long_rows else self.num_rows
        num_states = min(query_tokens, max_query_tokens) * self.group
        programs = num_tiles * self.num_kv_heads
        if num_splits > 1 and (workspace is None or not _holds(workspace, programs, num_states, head_dim)):
            raise ValueError("workspace must hold every program's segments when num_splits > 1")
        attend[(num_tiles, self.num_kv_heads, num_splits)](
            self.q_TNH,
            self.key_PBKH,
            self.value_PBKH,
            *self.rows,
            self.out_TNH,
            workspace.state_WSM2 if workspace is not None else self.out_TNH,
            workspace.partial_WSMH if workspace is not None else self.out_TNH,
            workspace.arrivals_W if workspace is not None else self.rows[1],
            self.num_rows,
            self.rows[0].stride(0),
            workspace.state_WSM2.shape[1] if workspace is not None else 0,
            workspace.state_WSM2.shape[2] if workspace is not None else 0,
            *self.scalars,
            HEAD_PADDED=max(16, triton.next_power_of_2(head_dim)),
            PAIRS=tile.pairs,
            LONG_ROWS=long_rows,
            SPLIT=num_splits > 1,
            MERGE_STAGES=merge_stages(tile.pairs, head_dim, self.traits),
            BLOCK=self.key_PBKH.shape[1],
            DOT=dot_dtype(self.q_TNH.dtype, self.traits),
            KV_MODE=KV_AS_STORED,
            PDL=self.traits.dependent_launch,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            **self._constants(query_tokens),
        )

    def attend_long_rows(self, num_splits: int, workspace: AttentionWorkspace | None) -> None:
        """The kernel of Hopper GPUs: as many programs as multiprocessors, or as there is work for."""
        query_tokens = HOPPER_PAIRS // self.group
        num_tiles = self.num_tiles(query_tokens)
        programs = num_tiles * self.num_kv_heads
        states: _States | None = None
        if num_splits > 1:
            if workspace is None or not _holds(workspace, programs, HOPPER_PAIRS, self.q_TNH.shape[2]):
                raise ValueError("workspace must hold every program's segments when num_splits > 1")
            max_segments, num_states = workspace.state_WSM2.shape[1:3]
            states = workspace.state_WSM2, workspace.partial_WSMH, max_segments, num_states
        dtype = dot_dtype(self.q_TNH.dtype, self.traits)
        attend_long_rows[(min(programs * num_splits, self.traits.num_sms),)](
            self.q_TNH,
            *self._descriptors(dtype),
            *self.rows,
            self.out_TNH,
            *(states or (None, None, 0, 0)),
            self.num_rows,
            num_tiles,
            num_splits,
            self.rows[0].stride(0),
            *self.scalars,
            BLOCK=self.key_PBKH.shape[1],
            DOT=dtype,
            SPLIT=states is not None,
            STAGES=HOPPER_STAGES,
            num_warps=4,
            **self._constants(query_tokens),
        )
        if states is not None:
            self._merge_long_rows(states, query_tokens)

    def _merge_long_rows(self, states: _States, query_tokens: int) -> None:
        """Outputs from the states that programs which share a row's KV have left.

        Nothing may be launched between them and this: before it waits it reads query starts and starts, which have been
        written because `attend_long_rows` lets its successor start only when all before itself has finished.
        """
        scale, _, out_stride = self.scalars
        num_chunks = triton.cdiv(query_tokens * self.group, MERGED_PAIRS)
        merge_long_rows[(self.num_tiles(query_tokens), self.num_kv_heads, num_chunks)](
            *self.rows[1:],
            self.out_TNH,
            *states,
            self.num_rows,
            scale,
            out_stride,
            PAIRS=MERGED_PAIRS,
            AHEAD=MERGED_AHEAD,
            PDL=self.traits.dependent_launch,
            # Otherwise the assembler saves registers and fetches one state after the other.
            maxnreg=128,
            **self._constants(query_tokens),
        )

    def _descriptors(self, dtype: tl.dtype) -> tuple[TensorDescriptor, TensorDescriptor]:
        """Keys and values, to be copied tile by tile."""
        num_blocks, block_size, num_kv_heads, head_dim = self.key_PBKH.shape
        # One copy takes what a tile has of a block, of one KV head.
        box = [min(block_size, TILE_TOKENS), head_dim]
        width = num_kv_heads * head_dim
        size, stride = [num_blocks * block_size, width], [width, 1]
        layout = _layout(*box, dtype)
        return (
            TensorDescriptor(self.key_PBKH, size, stride, box, layout),
            TensorDescriptor(self.value_PBKH, size, stride, box, layout),
        )

    def _constants(self, query_tokens: int) -> dict[str, object]:
        """What all kernels are compiled for, and how."""
        return {
            "GROUP": self.group,
            "HEAD": self.q_TNH.shape[2],
            "NUM_KV_HEADS": self.num_kv_heads,
            "QUERY_TOKENS": query_tokens,
            "TILE": TILE_TOKENS,
            "SEGMENT": SEGMENT_TOKENS,
            "WINDOW": self.window_tokens,
            **self.traits.launch_options,
        }


# Each asking takes 30 us of the host's time.
@functools.cache
def _layout(num_tokens: int, head_dim: int, dtype: tl.dtype) -> NVMMASharedLayout:
    """How a tile lies in shared memory."""
    return NVMMASharedLayout.get_default_for([num_tokens, head_dim], dtype)


def _check_pool(q_TNH: torch.Tensor, key_PBKH: torch.Tensor, value_PBKH: torch.Tensor, traits: GpuTraits) -> None:
    num_heads, num_kv_heads = q_TNH.shape[1], key_PBKH.shape[2]
    if num_heads % num_kv_heads:
        raise ValueError(f"query heads must be a multiple of the {num_kv_heads} KV heads, got {num_heads}")
    if not (key_PBKH.is_contiguous() and value_PBKH.is_contiguous()):
        raise ValueError("the KV pool must be contiguous")
    if key_PBKH.dtype == torch.float8_e4m3fn and not traits.has_fp8:
        raise ValueError("a float8_e4m3fn KV cache needs compute capability >= 8.9")


def _holds(workspace: AttentionWorkspace, num_programs: int, num_states: int, head_dim: int) -> bool:
    programs, _, states, head = workspace.partial_WSMH.shape
    return programs >= num_programs and states >= num_states and head == head_dim
