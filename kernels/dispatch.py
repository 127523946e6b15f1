"""Which implementation of each operation serves a device: chosen once, when a model is loaded.

`Kernels` is what the layers call. Implementations differ in speed and in their last bits, so one engine never mixes
two of them for one operation: the promise that a request's tokens do not depend on its neighbours holds per set.
"""

import dataclasses
from collections.abc import Callable

import torch

from triode.kernels.linear import cpu as cpu_linear
from triode.kernels.linear import reference as reference_linear
from triode.kernels.paged_attention import reference as reference_attention
from triode.kernels.rms_norm import reference as reference_norm
from triode.kernels.rotary import reference as reference_rotary
from triode.kernels.store_kv import reference as reference_store
from triode.kernels.swiglu import reference as reference_swiglu

PrepareLinear = Callable[[torch.Tensor, torch.Tensor | None], reference_linear.PreparedLinear]
"""A weight [E, D] and its bias, to the function that multiplies by them."""


@dataclasses.dataclass(frozen=True, slots=True)
class Kernels:
    """One callable an operation; the shapes are those of each operation's `reference.py`."""

    prepare_linear: PrepareLinear
    rms_norm: Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]
    add_rms_norm: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float], torch.Tensor]
    rotary: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]
    store_kv: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None]
    swiglu: Callable[[torch.Tensor], torch.Tensor]
    plan_attention: Callable[..., reference_attention.AttentionPlan]
    paged_attention: Callable[
        [torch.Tensor, torch.Tensor, torch.Tensor, reference_attention.AttentionPlan, float], torch.Tensor
    ]
    row_multiple: int
    """Steps are padded to a multiple of this many tokens."""
    names: dict[str, str]
    """Operation to implementation, for statistics and `triode doctor`."""
    exceptions: Callable[[], list[str]] = list
    """What is served otherwise than usual to keep the promise; complete once every weight has been prepared."""


_REFERENCE = dict.fromkeys(("rms_norm", "rotary", "store_kv", "swiglu", "paged_attention"), "reference")


def choose_kernels(device: torch.device, dtype: torch.dtype) -> Kernels:
    """The kernels for a device and a dtype of the weights.

    Raises:
        ValueError: no kernel computes in this dtype.
    """
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"dtype must be float32, bfloat16 or float16, got {dtype}")
    if device.type != "cpu":
        return _kernels(reference_linear.prepare_linear, "reference")
    linears = cpu_linear.CpuLinears(dtype)
    return dataclasses.replace(_kernels(linears, linears.name), exceptions=linears.exceptions)


def _kernels(prepare_linear: PrepareLinear, linear_name: str) -> Kernels:
    return Kernels(
        prepare_linear=prepare_linear,
        rms_norm=reference_norm.rms_norm,
        add_rms_norm=reference_norm.add_rms_norm,
        rotary=reference_rotary.rotary,
        store_kv=reference_store.store_kv,
        swiglu=reference_swiglu.swiglu,
        plan_attention=reference_attention.plan_attention,
        paged_attention=reference_attention.paged_attention,
        row_multiple=reference_attention.ROW_MULTIPLE,
        names={"linear": linear_name, **_REFERENCE},
    )
