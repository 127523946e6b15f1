"""The QKV product of few tokens with all that lies between it and attention, in one kernel on an NVIDIA GPU.

A decode step of few rows is a chain of short kernels, each of which costs a launch and a round trip to memory. Here the
program that has the sums of two weight rows, dimension i of a head and its partner i + H/2, adds the bias, rotates them
and writes them where they belong. Every number is rounded where `linear/gpu.py` and `qkv_epilogue/gpu.py` round it, so
the bits are theirs. A norm of queries and keys needs whole heads, and so do partly rotated ones: they take the two kernels.

T packed tokens    D hidden    N query heads    K KV heads    H head dim    E (N + 2K) H    U H / 2
P blocks    B block size    X positions
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import torch
import triton
import triton.language as tl

from triode.kernels.gpu_traits import GpuTraits
from triode.kernels.linear.gpu import sums_in_order, tile_options
from triode.kernels.linear.tiles import LinearTile
from triode.kernels.qkv_epilogue.gpu import check_layout, rotate, store_part


@triton.jit(do_not_specialize=["num_tokens"])
def project_qkv(
    x_ptr, weight_ptr, bias_ptr, cos_ptr, sin_ptr, position_ptr, slot_ptr, qkv_ptr, key_ptr, value_ptr,
    num_tokens, in_features, x_stride, qkv_stride,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HALF: tl.constexpr, BIAS: tl.constexpr,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, FEATURES: tl.constexpr, WHOLE: tl.constexpr, AHEAD: tl.constexpr,
    DOT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """ROWS pairs of dimensions; pair p is dimension p % HALF of head p // HALF and the one that it rotates with."""
    pair = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    real_pair = pair < (NUM_HEADS + 2 * NUM_KV_HEADS) * HALF
    head = tl.where(real_pair, pair, 0) // HALF
    dim = tl.where(real_pair, pair, 0) % HALF
    row = (head * 2 * HALF + dim).to(tl.int64)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    real = token < num_tokens
    acc1, acc2 = sums_in_order(
        x_ptr, weight_ptr, row, row + HALF, token, real, in_features, x_stride,
        ROWS, TOKENS, FEATURES, WHOLE, AHEAD, True, DOT, PDL,
    )  # fmt: skip
    # As a product on its own rounds them.
    x1 = acc1.to(qkv_ptr.dtype.element_ty).to(tl.float32)
    x2 = acc2.to(qkv_ptr.dtype.element_ty).to(tl.float32)
    if BIAS:
        x1 += tl.load(bias_ptr + row).to(tl.float32)[:, None]
        x2 += tl.load(bias_ptr + row + HALF).to(tl.float32)[:, None]
    is_q = (head < NUM_HEADS)[:, None]
    is_v = (head >= NUM_HEADS + NUM_KV_HEADS)[:, None]
    position = tl.load(position_ptr + token, mask=real, other=0).to(tl.int64)
    slot = tl.load(slot_ptr + token, mask=real, other=0).to(tl.int64)
    rope_at = position[None, :] * HALF + dim[:, None]
    y1, y2 = rotate(x1, x2, tl.load(cos_ptr + rope_at), tl.load(sin_ptr + rope_at), is_v)
    kv_head = tl.where(is_v, head[:, None] - NUM_HEADS - NUM_KV_HEADS, head[:, None] - NUM_HEADS)
    at = token.to(tl.int64)[None, :] * qkv_stride + row[:, None]
    kv_at = (slot[None, :] * NUM_KV_HEADS + kv_head) * 2 * HALF + dim[:, None]
    mask = real_pair[:, None] & real[None, :]
    is_k = (is_q | is_v) == 0
    store_part(qkv_ptr, key_ptr, value_ptr, y1, at, kv_at, mask, is_q, is_k, is_v)
    store_part(qkv_ptr, key_ptr, value_ptr, y2, at + HALF, kv_at + HALF, mask, is_q, is_k, is_v)


def qkv_fused(
    x_TD: torch.Tensor,
    weight_ED: torch.Tensor,
    qkv_TE: torch.Tensor,
    cos_XU: torch.Tensor,
    sin_XU: torch.Tensor,
    position_T: torch.Tensor,
    slot_T: torch.Tensor,
    key_PBKH: torch.Tensor,
    value_PBKH: torch.Tensor,
    num_heads: int,
    tile: LinearTile,
    traits: GpuTraits,
    *,
    bias_E: torch.Tensor | None = None,
) -> torch.Tensor:
    """Write keys and values into the pool and queries into `qkv_TE`; returns the queries, a `q_TNH` view.

    `tile.rows` counts pairs of weight rows. The rest is as in `qkv_epilogue`, whose keys and values in `qkv_TE` this leaves
    unwritten.

    Raises:
        ValueError: shapes or layouts do not fit together, or heads are not rotated whole.
    """
    num_tokens, in_features = x_TD.shape
    num_kv_heads, head_dim = key_PBKH.shape[2:]
    check_layout(qkv_TE, cos_XU, key_PBKH, value_PBKH, num_heads)
    if 2 * cos_XU.shape[1] != head_dim:
        raise ValueError(f"heads must be rotated whole, got {2 * cos_XU.shape[1]} of {head_dim} dimensions")
    num_pairs = (num_heads + 2 * num_kv_heads) * cos_XU.shape[1]
    project_qkv[(triton.cdiv(num_pairs, tile.rows), triton.cdiv(num_tokens, tile.tokens))](
        x_TD,
        weight_ED,
        weight_ED if bias_E is None else bias_E,
        cos_XU,
        sin_XU,
        position_T,
        slot_T,
        qkv_TE,
        key_PBKH,
        value_PBKH,
        num_tokens,
        in_features,
        x_TD.stride(0),
        qkv_TE.stride(0),
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        HALF=cos_XU.shape[1],
        BIAS=bias_E is not None,
        **tile_options(tile, x_TD, traits, paired=True),
    )
    return qkv_TE[:, : num_heads * head_dim].view(num_tokens, num_heads, head_dim)
