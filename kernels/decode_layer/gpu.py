"""All of a layer between two attentions for one token, in one launch on a Hopper GPU: `layer.py` has the kernel and the idea.

D hidden    E (N + 2 K) H    N query heads    K KV heads    H head dim    A N H    F intermediate
P blocks    B block size    X positions    U H / 2
"""

import dataclasses
import functools

import torch
from triton.experimental.gluon.language import NVMMASharedLayout
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from triode.kernels.decode_layer.layer import decode_layer
from triode.kernels.decode_layer.plan import STAGE_NUMBERS, LayerPlan
from triode.kernels.device_code import TRITON_DTYPES
from triode.kernels.gpu_traits import GpuTraits

COUNTERS = 96
"""int32 numbers, zero at first, through which the programs of a launch wait for one another."""


@dataclasses.dataclass(frozen=True, slots=True)
class LayerMatrices:
    """A layer's weights after attention, and those of the next layer's projection, as they are copied."""

    o: TensorDescriptor
    gate_up: TensorDescriptor
    down: TensorDescriptor
    qkv: TensorDescriptor

    @classmethod
    def bind(
        cls, o_DA: torch.Tensor, gate_up_FD: torch.Tensor, down_DF: torch.Tensor, qkv_ED: torch.Tensor, plan: LayerPlan
    ) -> "LayerMatrices":
        """All contiguous, of the activations' type."""
        heights = plan.heights
        return cls(
            o=_descriptor(o_DA, heights.o, heights.o),
            gate_up=_descriptor(gate_up_FD, heights.gate_up, heights.gate_up // 2),
            down=_descriptor(down_DF, heights.down, heights.down),
            qkv=_descriptor(qkv_ED, heights.qkv, heights.qkv // 2),
        )


@dataclasses.dataclass(frozen=True, slots=True)
class LayerVectors:
    """What a layer reads and writes besides: one token's. Everything is contiguous."""

    attended_A: torch.Tensor
    residual_D: torch.Tensor
    next_residual_D: torch.Tensor
    """The residual after the layer; after the last one, before its down product is added. Not `residual_D`."""
    o_D: torch.Tensor
    gated_F: torch.Tensor
    down_D: torch.Tensor
    post_norm_D: torch.Tensor
    next_norm_D: torch.Tensor
    counters: torch.Tensor


@dataclasses.dataclass(frozen=True, slots=True)
class Projection:
    """Where the next layer's queries, keys and values go, and what they are rotated by; as `qkv_fused` has it."""

    bias_E: torch.Tensor | None
    cos_XU: torch.Tensor
    sin_XU: torch.Tensor
    position_T: torch.Tensor
    slot_T: torch.Tensor
    qkv_TE: torch.Tensor
    key_PBKH: torch.Tensor
    value_PBKH: torch.Tensor


def finish_layer(
    matrices: LayerMatrices,
    vectors: LayerVectors,
    projection: Projection,
    eps: float,
    plan: LayerPlan,
    traits: GpuTraits,
    *,
    last: bool,
) -> None:
    """Compute what follows attention, and unless it is the `last` layer the next one's queries, keys and values.

    Of the last layer `down_D` has yet to be added to `next_residual_D`.
    """
    sizes, heights = plan.sizes, plan.heights
    half = sizes.head_dim // 2
    decode_layer[(traits.num_sms,)](
        matrices.o,
        matrices.gate_up,
        matrices.down,
        matrices.qkv,
        vectors.attended_A,
        vectors.residual_D,
        vectors.next_residual_D,
        vectors.o_D,
        vectors.gated_F,
        vectors.down_D,
        vectors.post_norm_D,
        vectors.next_norm_D,
        projection.qkv_TE if projection.bias_E is None else projection.bias_E,
        projection.cos_XU,
        projection.sin_XU,
        projection.position_T,
        projection.slot_T,
        projection.qkv_TE,
        projection.key_PBKH,
        projection.value_PBKH,
        vectors.counters,
        eps,
        int(last),
        OUT=(sizes.hidden // heights.o, sizes.attended, heights.o),
        GATE_UP=(2 * sizes.intermediate // heights.gate_up, sizes.hidden, heights.gate_up // 2),
        DOWN=(sizes.hidden // heights.down, sizes.intermediate, heights.down),
        QKV=(sizes.qkv // heights.qkv, sizes.hidden, heights.qkv // 2),
        NUM_HEADS=sizes.num_heads,
        NUM_KV_HEADS=sizes.num_kv_heads,
        HALF=half,
        BIAS=projection.bias_E is not None,
        HIDDEN=sizes.hidden,
        HIDDEN_PADDED=plan.hidden_padded,
        WIDEST=plan.widest,
        STAGES=plan.stages,
        DOT=TRITON_DTYPES[vectors.attended_A.dtype],
        num_warps=4,
        # Programs wait for one another, so none may wait for a multiprocessor.
        launch_cooperative_grid=True,
        **traits.launch_options,
    )


def _descriptor(weight: torch.Tensor, height: int, box_rows: int) -> TensorDescriptor:
    num_rows, features = weight.shape
    box = [box_rows, STAGE_NUMBERS // height]
    return TensorDescriptor(weight, [num_rows, features], [features, 1], box, _layout(*box, weight.dtype))


@functools.cache
def _layout(rows: int, features: int, dtype: torch.dtype) -> NVMMASharedLayout:
    return NVMMASharedLayout.get_default_for([rows, features], TRITON_DTYPES[dtype])
