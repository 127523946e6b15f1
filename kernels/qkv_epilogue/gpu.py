"""What lies between the QKV product and attention, in one kernel on an NVIDIA GPU.

Bias, norm of queries and keys (Qwen3), rotary embedding, and the write of keys and values into the paged pool. Each
value is read once and written once: rotated queries go back to where they were, so attention reads them as a view of the
QKV buffer, and keys and values go straight to their slots. All arithmetic is float32; it is rounded at the end, and
after the norm and its weight, where a model's own bfloat16 code rounds too.

A program takes `HEADS` heads of one token, of whichever kind: a head's norm is summed in one order for every T.
Rotation pairs dimension i with i + r/2 (r the rotated part of the head), so the two halves are separate tiles and no
thread reads what another one writes.

T packed tokens    N query heads    K KV heads    H head dim    E (N + 2K) H    P blocks    B block size    X positions
r rotated dims of a head (rope tables hold r / 2 columns)
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import torch
import triton
import triton.language as tl

from triode.kernels.device_code import wait_for_inputs
from triode.kernels.gpu_traits import GpuTraits

# As many as keep memory busy: programs of 4 heads and one warp took 45 us instead of 28 for 4,096 tokens of Qwen2.5-7B on
# an H100, and no less for few.
HEADS_PER_PROGRAM = 16


@triton.jit
def kinds_of(head, NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr):
    """Which heads of a QKV row are queries, keys and values, and the KV head of the last two."""
    is_q = (head < NUM_HEADS)[:, None]
    is_v = (head >= NUM_HEADS + NUM_KV_HEADS)[:, None]
    kv_head = head - NUM_HEADS
    return is_q, (is_q | is_v) == 0, is_v, tl.where(kv_head >= NUM_KV_HEADS, kv_head - NUM_KV_HEADS, kv_head)


@triton.jit
def load_part(qkv_row, bias_ptr, head, dim, mask, HEAD: tl.constexpr, BIAS: tl.constexpr):
    """A part of the heads' dimensions, with its bias."""
    at = head[:, None] * HEAD + dim[None, :]
    x = tl.load(qkv_row + at, mask=mask, other=0.0).to(tl.float32)
    if BIAS:
        x += tl.load(bias_ptr + at, mask=mask, other=0.0).to(tl.float32)
    return x


@triton.jit
def norm_part(x, inverse_rms, q_norm_ptr, k_norm_ptr, dim, in_part, is_q, is_v, DTYPE: tl.constexpr):
    """Queries and keys normalised, values as they are."""
    q_weight = tl.load(q_norm_ptr + dim, mask=in_part, other=0.0).to(tl.float32)
    k_weight = tl.load(k_norm_ptr + dim, mask=in_part, other=0.0).to(tl.float32)
    weight = tl.where(is_q, q_weight[None, :], k_weight[None, :])
    normal = (x * inverse_rms[:, None]).to(DTYPE).to(tl.float32) * weight
    return tl.where(is_v, x, normal.to(DTYPE).to(tl.float32))


@triton.jit
def store_part(qkv_ptr, key_ptr, value_ptr, x, at, kv_at, mask, is_q, is_k, is_v):
    """Each head to where its kind belongs."""
    tl.store(qkv_ptr + at, x.to(qkv_ptr.dtype.element_ty), mask=mask & is_q)
    tl.store(key_ptr + kv_at, x.to(key_ptr.dtype.element_ty), mask=mask & is_k)
    tl.store(value_ptr + kv_at, x.to(value_ptr.dtype.element_ty), mask=mask & is_v)


@triton.jit
def store_dims(qkv_row, key_ptr, value_ptr, x, head, kv_row, dim, mask, is_q, is_k, is_v, HEAD: tl.constexpr):
    """The same for a part of the dimensions of one token's heads."""
    at = head[:, None] * HEAD + dim[None, :]
    kv_at = kv_row[:, None] * HEAD + dim[None, :]
    store_part(qkv_row, key_ptr, value_ptr, x, at, kv_at, mask, is_q, is_k, is_v)


@triton.jit
def rotate(x1, x2, cos, sin, is_v):
    """Pairs of dimensions of queries and keys rotated, values as they are."""
    return tl.where(is_v, x1, x1 * cos - x2 * sin), tl.where(is_v, x2, x2 * cos + x1 * sin)


@triton.jit
def finish_qkv(
    qkv_ptr, bias_ptr, q_norm_ptr, k_norm_ptr, cos_ptr, sin_ptr, position_ptr, slot_ptr, key_ptr, value_ptr,
    qkv_stride, eps,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD: tl.constexpr, HALF: tl.constexpr,
    HALF_PADDED: tl.constexpr, REST_PADDED: tl.constexpr, HEADS: tl.constexpr,
    BIAS: tl.constexpr, NORM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """HEADS heads of one token; head h of the row is a query, a key or a value by its number."""
    wait_for_inputs(PDL)
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    real = (head < NUM_HEADS + 2 * NUM_KV_HEADS)[:, None]
    is_q, is_k, is_v, kv_head = kinds_of(head, NUM_HEADS, NUM_KV_HEADS)
    half = tl.arange(0, HALF_PADDED)
    in_half = half < HALF
    rope_at = tl.load(position_ptr + token).to(tl.int64) * HALF + half
    cos = tl.load(cos_ptr + rope_at, mask=in_half, other=0.0)[None, :]
    sin = tl.load(sin_ptr + rope_at, mask=in_half, other=0.0)[None, :]
    kv_row = tl.load(slot_ptr + token).to(tl.int64) * NUM_KV_HEADS + kv_head

    qkv_row = qkv_ptr + token * qkv_stride
    mask = real & in_half[None, :]
    x1 = load_part(qkv_row, bias_ptr, head, half, mask, HEAD, BIAS)
    x2 = load_part(qkv_row, bias_ptr, head, HALF + half, mask, HEAD, BIAS)
    if REST_PADDED > 0:
        rest = 2 * HALF + tl.arange(0, REST_PADDED)
        in_rest = rest < HEAD
        rest_mask = real & in_rest[None, :]
        x3 = load_part(qkv_row, bias_ptr, head, rest, rest_mask, HEAD, BIAS)
    if NORM:
        square_sum = tl.sum(x1 * x1, 1) + tl.sum(x2 * x2, 1)
        if REST_PADDED > 0:
            square_sum += tl.sum(x3 * x3, 1)
        inverse_rms = tl.rsqrt(square_sum / HEAD + eps)
        dtype: tl.constexpr = qkv_ptr.dtype.element_ty
        x1 = norm_part(x1, inverse_rms, q_norm_ptr, k_norm_ptr, half, in_half, is_q, is_v, dtype)
        x2 = norm_part(x2, inverse_rms, q_norm_ptr, k_norm_ptr, half + HALF, in_half, is_q, is_v, dtype)
        if REST_PADDED > 0:
            x3 = norm_part(x3, inverse_rms, q_norm_ptr, k_norm_ptr, rest, in_rest, is_q, is_v, dtype)
    y1, y2 = rotate(x1, x2, cos, sin, is_v)
    store_dims(qkv_row, key_ptr, value_ptr, y1, head, kv_row, half, mask, is_q, is_k, is_v, HEAD)
    store_dims(qkv_row, key_ptr, value_ptr, y2, head, kv_row, HALF + half, mask, is_q, is_k, is_v, HEAD)
    if REST_PADDED > 0:
        store_dims(qkv_row, key_ptr, value_ptr, x3, head, kv_row, rest, rest_mask, is_q, is_k, is_v, HEAD)


def check_layout(
    qkv_TE: torch.Tensor, cos_Xr: torch.Tensor, key_PBKH: torch.Tensor, value_PBKH: torch.Tensor, num_heads: int
) -> None:
    """ValueError where shapes or layouts do not fit together."""
    num_kv_heads, head_dim = key_PBKH.shape[2:]
    width = (num_heads + 2 * num_kv_heads) * head_dim
    if qkv_TE.shape[1] != width:
        raise ValueError(f"qkv must have {width} columns, got {qkv_TE.shape[1]}")
    if 2 * cos_Xr.shape[1] > head_dim:
        raise ValueError(f"rope tables must have at most {head_dim // 2} columns, got {cos_Xr.shape[1]}")
    if not (key_PBKH.is_contiguous() and value_PBKH.is_contiguous()):
        raise ValueError(f"the KV pool must be contiguous, got strides {key_PBKH.stride()} and {value_PBKH.stride()}")


def qkv_epilogue(
    qkv_TE: torch.Tensor,
    cos_Xr: torch.Tensor,
    sin_Xr: torch.Tensor,
    position_T: torch.Tensor,
    slot_T: torch.Tensor,
    key_PBKH: torch.Tensor,
    value_PBKH: torch.Tensor,
    num_heads: int,
    traits: GpuTraits,
    *,
    bias_E: torch.Tensor | None = None,
    q_norm_H: torch.Tensor | None = None,
    k_norm_H: torch.Tensor | None = None,
    eps: float = 0.0,
) -> torch.Tensor:
    """Finish the queries in place and write keys and values into the pool; returns the queries, a `q_TNH` view.

    Args:
        qkv_TE: the QKV product without its bias: all query heads, then the keys', then the values'. The key and value
            parts are left as they are.
        cos_Xr: float32 table by position, r / 2 columns; like `sin_Xr`.
        slot_T: where each token's KV goes, block * B + offset. Padding tokens point into block 0.
        key_PBKH: contiguous, like `value_PBKH`; any type attention reads.
        q_norm_H: with `k_norm_H` and `eps`, the RMSNorm of each head before rotation.

    Raises:
        ValueError: shapes or layouts do not fit together.
    """
    num_tokens = qkv_TE.shape[0]
    num_kv_heads, head_dim = key_PBKH.shape[2:]
    rotated_half = cos_Xr.shape[1]
    check_layout(qkv_TE, cos_Xr, key_PBKH, value_PBKH, num_heads)
    if (q_norm_H is None) != (k_norm_H is None):
        raise ValueError("q_norm and k_norm must both be given or both be None")
    rest = head_dim - 2 * rotated_half
    finish_qkv[(num_tokens, triton.cdiv(num_heads + 2 * num_kv_heads, HEADS_PER_PROGRAM))](
        qkv_TE,
        qkv_TE if bias_E is None else bias_E,
        qkv_TE if q_norm_H is None else q_norm_H,
        qkv_TE if k_norm_H is None else k_norm_H,
        cos_Xr,
        sin_Xr,
        position_T,
        slot_T,
        key_PBKH,
        value_PBKH,
        qkv_TE.stride(0),
        eps,
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        HEAD=head_dim,
        HALF=rotated_half,
        HALF_PADDED=triton.next_power_of_2(rotated_half),
        REST_PADDED=triton.next_power_of_2(rest) if rest else 0,
        HEADS=HEADS_PER_PROGRAM,
        BIAS=bias_E is not None,
        NORM=q_norm_H is not None,
        PDL=traits.dependent_launch,
        num_warps=HEADS_PER_PROGRAM // 4,
        **traits.launch_options,
    )
    return qkv_TE[:, : num_heads * head_dim].view(num_tokens, num_heads, head_dim)
