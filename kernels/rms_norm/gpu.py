"""RMSNorm on an NVIDIA GPU, alone or behind the addition to the residual stream.

One program a row: the row is read once, summed in float32 in one fixed order (the number of warps follows from D, never
from T) and written once, so a token's bits are its own.

T packed tokens    D hidden
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import torch
import triton
import triton.language as tl

from triode.kernels.device_code import wait_for_inputs
from triode.kernels.gpu_traits import GpuTraits


@triton.jit
def normalise_row(
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    x_stride,
    eps,
    HIDDEN: tl.constexpr,
    HIDDEN_PADDED: tl.constexpr,
    ADD: tl.constexpr,
    PDL: tl.constexpr,
):
    """out = norm(x) * weight; with ADD the residual becomes residual + x first, and is what is normalised."""
    dim = tl.arange(0, HIDDEN_PADDED)
    mask = dim < HIDDEN
    weight = tl.load(weight_ptr + dim, mask=mask, other=0.0).to(tl.float32)
    wait_for_inputs(PDL)
    row = tl.program_id(0).to(tl.int64)
    x = tl.load(x_ptr + row * x_stride + dim, mask=mask, other=0.0).to(tl.float32)
    if ADD:
        at = residual_ptr + row * HIDDEN + dim
        total = (x + tl.load(at, mask=mask, other=0.0).to(tl.float32)).to(residual_ptr.dtype.element_ty)
        tl.store(at, total, mask=mask)
        x = total.to(tl.float32)
    inverse_rms = tl.rsqrt(tl.sum(x * x, 0) / HIDDEN + eps)
    normal = (x * inverse_rms).to(out_ptr.dtype.element_ty).to(tl.float32)
    tl.store(out_ptr + row * HIDDEN + dim, (normal * weight).to(out_ptr.dtype.element_ty), mask=mask)


def num_warps(padded_hidden: int) -> int:
    """How many warps share a row: their number is part of the order in which it is summed.

    Four where `decode_layer` may norm the same rows, since it has four warps to do so.
    """
    return 4 if 1024 <= padded_hidden <= 4096 else max(1, min(16, padded_hidden // 512))


def rms_norm(x_TD: torch.Tensor, weight_D: torch.Tensor, eps: float, out_TD: torch.Tensor, traits: GpuTraits) -> None:
    """Write `x / sqrt(mean(x²) + eps) * weight` into `out_TD`, rounded before the weight is applied.

    Rows of x may be apart; out is contiguous.
    """
    _launch(x_TD, None, weight_D, eps, out_TD, traits)


def add_rms_norm(
    x_TD: torch.Tensor,
    residual_TD: torch.Tensor,
    weight_D: torch.Tensor,
    eps: float,
    out_TD: torch.Tensor,
    traits: GpuTraits,
) -> None:
    """Add x to the residual in place, rounded to the residual's type, and write the norm of the sum into `out_TD`."""
    _launch(x_TD, residual_TD, weight_D, eps, out_TD, traits)


def _launch(
    x_TD: torch.Tensor,
    residual_TD: torch.Tensor | None,
    weight_D: torch.Tensor,
    eps: float,
    out_TD: torch.Tensor,
    traits: GpuTraits,
) -> None:
    num_tokens, hidden = x_TD.shape
    if x_TD.stride(1) != 1 or not out_TD.is_contiguous() or not (residual_TD is None or residual_TD.is_contiguous()):
        raise ValueError("residual and out must be contiguous, and x along its last axis")
    padded = triton.next_power_of_2(hidden)
    normalise_row[(num_tokens,)](
        x_TD,
        x_TD if residual_TD is None else residual_TD,
        weight_D,
        out_TD,
        x_TD.stride(0),
        eps,
        HIDDEN=hidden,
        HIDDEN_PADDED=padded,
        ADD=residual_TD is not None,
        PDL=traits.dependent_launch,
        num_warps=num_warps(padded),
        **traits.launch_options,
    )
