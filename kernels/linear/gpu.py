"""Matrix products of few tokens on an NVIDIA GPU: K in order, never split, so that a token's bits are its own.

The idea. A decode step reads every weight once, so its products run at the speed of memory whatever the tokens are. Here
the weight's rows are the tensor core's M side ("swap AB") and the tokens its N side, padded to 16: little is wasted and
every byte of weight feeds a product. One program owns `rows` weight rows and walks all of K in order: fp32 sums are
taken in the same order for every number of tokens and every tile, and that order is also cuBLASLt's when it may not
split K. Hence both may serve the same weight, and `proof.py` checks on the GPU at hand that they agree bit for bit.

Weights never change, so a program may fetch them before its predecessors have finished: `ahead` features of its rows
wait in registers when its inputs are there. That pays where a program's rows fit whole, as in small models, whose chain
of short kernels is otherwise one memory latency after the other. Asking L2 for the head of large weights gains nothing: a
Qwen2.5-7B decode step took 5.39 to 5.92 ms with it on an H100, 5.41 without.

M tokens    K in features    N out features    F half of a gate-up weight's N
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import torch
import triton
import triton.language as tl

from triode.kernels.device_code import dot_dtype, let_next_start, silu_times, wait_for_previous
from triode.kernels.gpu_traits import GpuTraits
from triode.kernels.linear.tiles import LinearTile


@triton.jit
def weight_tile(weight_ptr, row, k, in_features, WHOLE: tl.constexpr, DOT: tl.constexpr):
    """Rows of the weight, features from k[0] on. Rows past the end repeat the last one; their product is not stored."""
    at = weight_ptr + row[:, None] * in_features + k[None, :]
    if WHOLE:
        return tl.load(at).to(DOT)
    return tl.load(at, mask=k[None, :] < in_features, other=0.0).to(DOT)


@triton.jit
def token_tile(x_row, real, k, in_features, WHOLE: tl.constexpr, DOT: tl.constexpr):
    """Features from k[0] on of each token, as columns; 0 past the end of either."""
    mask = real[None, :] if WHOLE else real[None, :] & (k[:, None] < in_features)
    return tl.load(x_row + k[:, None], mask=mask, other=0.0).to(DOT)


@triton.jit
def sums_in_order(
    x_ptr,
    weight_ptr,
    row,
    other_row,
    token,
    real,
    in_features,
    x_stride,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    FEATURES: tl.constexpr,
    WHOLE: tl.constexpr,
    AHEAD: tl.constexpr,
    PAIRED: tl.constexpr,
    DOT: tl.constexpr,
    PDL: tl.constexpr,
):
    """sum over k of weight[row, k] x[token, k], and with PAIRED the same of other_row. Waits for the previous kernels.

    AHEAD features of the weights are fetched before; all of them if there are no more, and then FEATURES is 0.
    """
    let_next_start(PDL)
    if AHEAD > 0:
        head = tl.arange(0, AHEAD)
        w_head = weight_tile(weight_ptr, row, head, in_features, WHOLE, DOT)
        if PAIRED:
            other_head = weight_tile(weight_ptr, other_row, head, in_features, WHOLE, DOT)
    wait_for_previous(PDL)
    x_row = x_ptr + token.to(tl.int64)[None, :] * x_stride
    acc = tl.zeros([ROWS, TOKENS], tl.float32)
    other_acc = tl.zeros([ROWS, TOKENS], tl.float32)
    if AHEAD > 0:
        x_head = token_tile(x_row, real, head, in_features, WHOLE, DOT)
        acc = tl.dot(w_head, x_head, acc, input_precision="ieee")
        if PAIRED:
            other_acc = tl.dot(other_head, x_head, other_acc, input_precision="ieee")
    if FEATURES > 0:
        for first in range(AHEAD, in_features, FEATURES):
            k = first + tl.arange(0, FEATURES)
            x = token_tile(x_row, real, k, in_features, WHOLE, DOT)
            w = weight_tile(weight_ptr, row, k, in_features, WHOLE, DOT)
            acc = tl.dot(w, x, acc, input_precision="ieee")
            if PAIRED:
                other = weight_tile(weight_ptr, other_row, k, in_features, WHOLE, DOT)
                other_acc = tl.dot(other, x, other_acc, input_precision="ieee")
    return acc, other_acc


@triton.jit(do_not_specialize=["num_tokens"])
def linear_in_order(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    num_tokens,
    in_features,
    out_features,
    x_stride,
    out_stride,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    FEATURES: tl.constexpr,
    WHOLE: tl.constexpr,
    AHEAD: tl.constexpr,
    DOT: tl.constexpr,
    SWIGLU: tl.constexpr,
    BIAS: tl.constexpr,
    PDL: tl.constexpr,
):
    """out[m, n] = sum over k of weight[n, k] x[m, k], or with SWIGLU silu of the first half's times the second half's.

    `out_features` counts columns of `out`. With SWIGLU the weight has twice as many rows: gates, then ups.
    """
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    last_row = tl.minimum(row, out_features - 1)
    up_row = last_row + out_features
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    real = token < num_tokens
    acc, up_acc = sums_in_order(
        x_ptr, weight_ptr, last_row, up_row, token, real, in_features, x_stride,
        ROWS, TOKENS, FEATURES, WHOLE, AHEAD, SWIGLU, DOT, PDL,
    )  # fmt: skip
    if BIAS:
        acc += tl.load(bias_ptr + last_row).to(tl.float32)[:, None]
        if SWIGLU:
            up_acc += tl.load(bias_ptr + up_row).to(tl.float32)[:, None]
    if SWIGLU:
        acc = silu_times(acc, up_acc, x_ptr.dtype.element_ty)
    out_at = out_ptr + token.to(tl.int64)[None, :] * out_stride + row[:, None]
    tl.store(out_at, acc.to(out_ptr.dtype.element_ty), mask=real[None, :] & (row[:, None] < out_features))


def tile_options(tile: LinearTile, x_MK: torch.Tensor, traits: GpuTraits, *, paired: bool) -> dict[str, object]:
    """How a product's kernel is compiled for this tile; `paired` if a program takes twice as many weight rows."""
    in_features = x_MK.shape[1]
    feature_bytes = (tile.rows * (2 if paired else 1) + tile.tokens) * x_MK.element_size()
    most_features = traits.shared_memory_bytes // feature_bytes
    ahead = tile.ahead if tile.ahead <= most_features else 0
    # Wide numbers may not leave room for one step of the tile; shorter ones give the same bits.
    features = min(tile.features, 1 << most_features.bit_length() - 1)
    num_left = max(0, in_features - ahead)
    return {
        "ROWS": tile.rows,
        "TOKENS": tile.tokens,
        "FEATURES": features if num_left else 0,
        "WHOLE": ahead <= in_features and num_left % features == 0,
        "AHEAD": ahead,
        "DOT": dot_dtype(x_MK.dtype, traits),
        "PDL": traits.dependent_launch,
        "num_warps": tile.num_warps,
        "num_stages": max(1, min(tile.num_stages, most_features // features)),
        **traits.launch_options,
    }


def linear_sequential(
    x_MK: torch.Tensor,
    weight_NK: torch.Tensor,
    out_MN: torch.Tensor,
    tile: LinearTile,
    traits: GpuTraits,
    *,
    bias_N: torch.Tensor | None = None,
    swiglu: bool = False,
) -> None:
    """Write `x @ weight.T (+ bias)` into `out_MN`; with `swiglu`, `silu(gate) * up` of its two halves into `out_MF`.

    Any tile gives the same bits. Products are summed in float32 and rounded once, to the type of `out_MN`.

    Raises:
        ValueError: the tensors are not laid out as the kernel reads them.
    """
    num_tokens, in_features = x_MK.shape
    out_features = weight_NK.shape[0] // 2 if swiglu else weight_NK.shape[0]
    if not weight_NK.is_contiguous() or x_MK.stride(1) != 1 or out_MN.stride(1) != 1:
        raise ValueError("the weight must be contiguous, and x and out along their last axis")
    if out_MN.shape != (num_tokens, out_features) or weight_NK.shape[1] != in_features:
        raise ValueError(f"out must be {(num_tokens, out_features)}, got {tuple(out_MN.shape)}")
    linear_in_order[(triton.cdiv(out_features, tile.rows), triton.cdiv(num_tokens, tile.tokens))](
        x_MK,
        weight_NK,
        weight_NK if bias_N is None else bias_N,
        out_MN,
        num_tokens,
        in_features,
        out_features,
        x_MK.stride(0),
        out_MN.stride(0),
        SWIGLU=swiglu,
        BIAS=bias_N is not None,
        **tile_options(tile, x_MK, traits, paired=swiglu),
    )
