"""Which implementation of each operation serves a device: chosen once, when a model is loaded.

`Kernels` is what the layers call. Implementations differ in speed and in their last bits, so one engine never mixes
two of them for one operation: the promise that a request's tokens do not depend on its neighbours holds per set.
"""

import dataclasses
from collections.abc import Callable

import torch

from triode.kernels.linear import cpu as cpu_linear
from triode.kernels.linear import reference as reference_linear
from triode.kernels.paged_attention import cpu as cpu_attention
from triode.kernels.paged_attention import reference as reference_attention
from triode.kernels.rms_norm import reference as reference_norm
from triode.kernels.rotary import reference as reference_rotary
from triode.kernels.store_kv import reference as reference_store

Weight = torch.Tensor
Bias = torch.Tensor | None


@dataclasses.dataclass(frozen=True, slots=True)
class Kernels:
    """One callable an operation; the shapes are those of each operation's `reference.py`."""

    prepare_linear: Callable[[Weight, Bias], reference_linear.PreparedLinear]
    """A weight [E, D] and its bias, to the function that multiplies by them."""
    prepare_gated: Callable[[Weight, Bias], reference_linear.PreparedLinear]
    """The same for a gate and an up projection, stacked, and the SwiGLU of what they give."""
    prepare_adding: Callable[[Weight, Bias], reference_linear.AddingLinear]
    """The same for a product that is added to a residual."""
    rms_norm: Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]
    rotary: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]
    store_kv: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None]
    prepare_attention: Callable[[int], None]
    """Called with the head size, before any step."""
    plan_attention: Callable[..., reference_attention.Attend]
    """A step's rows, to the attention of every layer with the same window."""
    row_multiple: int
    """Steps are padded to a multiple of this many tokens."""
    names: dict[str, str]
    """Operation to implementation, for statistics and `triode doctor`."""
    exceptions: Callable[[], list[str]] = list
    """What is served otherwise than usual to keep the promise; complete once every weight has been prepared."""


def choose_kernels(device: torch.device, dtype: torch.dtype) -> Kernels:
    """The kernels for a device and a dtype of the weights.

    Raises:
        ValueError: no kernel computes in this dtype.
    """
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"dtype must be float32, bfloat16 or float16, got {dtype}")
    return _cpu_kernels(dtype) if device.type == "cpu" else _REFERENCE


def _prepare_gated(weight: Weight, bias: Bias) -> reference_linear.PreparedLinear:
    return reference_linear.gated(reference_linear.prepare_linear(weight, bias))


def _prepare_adding(weight: Weight, bias: Bias) -> reference_linear.AddingLinear:
    return reference_linear.adding(reference_linear.prepare_linear(weight, bias))


_REFERENCE = Kernels(
    prepare_linear=reference_linear.prepare_linear,
    prepare_gated=_prepare_gated,
    prepare_adding=_prepare_adding,
    rms_norm=reference_norm.rms_norm,
    rotary=reference_rotary.rotary,
    store_kv=reference_store.store_kv,
    prepare_attention=lambda head_dim: None,
    plan_attention=reference_attention.prepare_step,
    row_multiple=reference_attention.ROW_MULTIPLE,
    names=dict.fromkeys(("linear", "rms_norm", "rotary", "store_kv", "swiglu", "paged_attention"), "reference"),
)


def _cpu_kernels(dtype: torch.dtype) -> Kernels:
    linears, attention = cpu_linear.CpuLinears(dtype), cpu_attention.CpuAttention()
    names = {"linear": linears.name, "swiglu": linears.swiglu_name, "paged_attention": attention.name}
    return dataclasses.replace(
        _REFERENCE,
        prepare_linear=linears,
        prepare_gated=linears.gated,
        prepare_adding=linears.adding,
        prepare_attention=attention.prepare,
        plan_attention=attention.plan,
        names={**_REFERENCE.names, **names},
        exceptions=lambda: linears.exceptions() + attention.exceptions(),
    )
