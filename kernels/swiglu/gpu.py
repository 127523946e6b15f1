"""SwiGLU on an NVIDIA GPU, for products that cuBLASLt computed. Few tokens use the one fused into `linear/gpu.py`.

T packed tokens    F intermediate size
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import torch
import triton
import triton.language as tl

from triode.kernels.device_code import silu_times, wait_for_inputs
from triode.kernels.gpu_traits import GpuTraits


@triton.jit
def gate_columns(gate_up_ptr, out_ptr, num_columns, COLUMNS: tl.constexpr, PDL: tl.constexpr):
    """A stretch of one row."""
    wait_for_inputs(PDL)
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mask = column < num_columns
    gate_at = gate_up_ptr + row * 2 * num_columns + column
    gate = tl.load(gate_at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_at + num_columns, mask=mask, other=0.0).to(tl.float32)
    out = silu_times(gate, up, gate_up_ptr.dtype.element_ty)
    tl.store(out_ptr + row * num_columns + column, out.to(out_ptr.dtype.element_ty), mask=mask)


def swiglu(gate_up_TF2: torch.Tensor, out_TF: torch.Tensor, traits: GpuTraits) -> None:
    """Write `silu(gate) * up` into `out_TF`; each row of the input is its gates, then its ups. Both contiguous."""
    if not (gate_up_TF2.is_contiguous() and out_TF.is_contiguous()):
        raise ValueError("gate_up and out must be contiguous")
    num_tokens, num_columns = out_TF.shape
    columns = min(2048, triton.next_power_of_2(num_columns))
    gate_columns[(num_tokens, triton.cdiv(num_columns, columns))](
        gate_up_TF2,
        out_TF,
        num_columns,
        COLUMNS=columns,
        PDL=traits.dependent_launch,
        num_warps=max(1, min(8, columns // 256)),
        **traits.launch_options,
    )
