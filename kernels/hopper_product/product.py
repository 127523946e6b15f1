"""`silu(gate) * up` of a gate-up product in one kernel, for many tokens on a Hopper GPU: loads and launches `product.cu`.

M tokens    K in features    F out features
"""

import functools
from ctypes import c_int, c_void_p

import torch

from triode.kernels.gpu_traits import GpuTraits
from triode.kernels.hopper_product.driver import TENSOR_TYPES, Kernel, Launch, TensorMap
from triode.kernels.hopper_product.nvrtc import compiled
from triode.kernels.hopper_product.source import KERNEL, headers, options, source
from triode.kernels.hopper_product.tiles import CLUSTER, MEASURED, STEP_FEATURES, ProductTile

_GROUP = 8
"""Gates or ups side by side: F is a multiple, and so is K, whose rows begin at multiples of 16 bytes."""
_GROUP_BYTES = 16
_TOKEN_TILES_IN_L2 = 8
"""Cluster tiles of tokens whose inputs L2 holds while weights go by."""
_REMEMBERED = 4096
_MEASURED_SMS = 132
"""Of an H100 SXM or H200. MEASURED's numbers of tokens are those that fill so many evenly."""


def takes(weight: torch.Tensor, bias: torch.Tensor | None, traits: GpuTraits) -> bool:
    """Whether the kernel should serve a weight [2F, K]."""
    num_rows, in_features = weight.shape
    return (
        traits.warp_group_products
        and traits.num_sms == _MEASURED_SMS
        and bias is None
        and weight.is_cuda
        and weight.dtype in (torch.bfloat16, torch.float16)
        and (num_rows // 2, in_features) in MEASURED
        and weight.is_contiguous()
        and weight.data_ptr() % _GROUP_BYTES == 0
    )


def swiglu_product(
    x_MK: torch.Tensor, weight_2FK: torch.Tensor, out_MF: torch.Tensor, tile: ProductTile, traits: GpuTraits
) -> None:
    """Write `silu(gate) * up` of `x @ weight.T` into `out_MF`, on torch's current stream; gates first, then ups.

    Any tile gives the same bits: those of the product, rounded, and of `kernels/swiglu`.

    Raises:
        ValueError: the tensors are not laid out as the kernel reads them.
        ProductUnavailable: the kernel cannot be compiled, loaded or launched.
    """
    _check(x_MK, weight_2FK, out_MF)
    (num_tokens, in_features), num_features = x_MK.shape, out_MF.shape[1]
    device = out_MF.device
    launch = _prepared(
        x_MK.data_ptr(),
        weight_2FK.data_ptr(),
        out_MF.data_ptr(),
        (num_tokens, num_features, in_features),
        x_MK.dtype,
        tile,
        traits,
        device,
    )
    launch(torch.cuda.current_stream(device).cuda_stream)


def _check(x_MK: torch.Tensor, weight_2FK: torch.Tensor, out_MF: torch.Tensor) -> None:
    (num_tokens, in_features), (num_rows, weight_features) = x_MK.shape, weight_2FK.shape
    if num_tokens == 0:
        raise ValueError("x must have at least one token, got 0")
    if num_rows % (2 * _GROUP) or weight_features % _GROUP:
        raise ValueError(f"weight must be a multiple of {2 * _GROUP} × {_GROUP}, got {num_rows} × {weight_features}")
    if in_features != weight_features:
        raise ValueError(f"x must have the weight's {weight_features} in features, got {in_features}")
    if out_MF.shape != (num_tokens, num_rows // 2):
        raise ValueError(f"out must be {(num_tokens, num_rows // 2)}, got {tuple(out_MF.shape)}")
    for name, tensor in (("x", x_MK), ("weight", weight_2FK), ("out", out_MF)):
        if tensor.dtype not in TENSOR_TYPES or tensor.dtype != weight_2FK.dtype:
            raise ValueError(f"{name} must be float16 or bfloat16, and all of one type, got {tensor.dtype}")
        if tensor.device != weight_2FK.device:
            raise ValueError(f"{name} must be on {weight_2FK.device}, where the weight is, got {tensor.device}")
        if not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()}")
        if tensor.data_ptr() % _GROUP_BYTES:
            raise ValueError(f"{name} must begin at a multiple of {_GROUP_BYTES} bytes, got {tensor.data_ptr():#x}")


@functools.lru_cache(maxsize=_REMEMBERED)
def _prepared(
    x: int,
    weight: int,
    out: int,
    sizes: tuple[int, int, int],
    dtype: torch.dtype,
    tile: ProductTile,
    traits: GpuTraits,
    device: torch.device,
) -> Launch:
    """Maps and arguments hold addresses alone, so that one product's are another's of the same place and size."""
    num_tokens, num_features, in_features = sizes
    row_bytes = in_features * dtype.itemsize
    tokens_at_once = tile.tokens // (1 if tile.shares_weight else CLUSTER)
    groups_at_once = tile.features // _GROUP // (CLUSTER if tile.shares_weight else 1)
    x_map = TensorMap(x, dtype, (in_features, num_tokens), (row_bytes,), (STEP_FEATURES, tokens_at_once))
    # Eight gates, their eight ups, the next eight gates.
    weight_map = TensorMap(
        weight,
        dtype,
        (in_features, _GROUP, 2, num_features // _GROUP),
        (row_bytes, num_features * row_bytes, _GROUP * row_bytes),
        (STEP_FEATURES, _GROUP, 2, groups_at_once),
    )
    return Launch(
        _loaded(tile, dtype, device),
        (x_map, weight_map, c_void_p(out), *map(c_int, sizes), c_int(_TOKEN_TILES_IN_L2)),
        num_programs=CLUSTER * min(traits.num_sms // CLUSTER, tile.num_clusters(num_tokens, num_features)),
        num_threads=tile.num_threads,
        cluster=CLUSTER,
        starts_early=traits.dependent_launch,
    )


@functools.cache
def _loaded(tile: ProductTile, dtype: torch.dtype, device: torch.device) -> Kernel:
    name = f"swiglu-{tile.tokens}x{tile.rows}"
    code = compiled(source(), headers(tile, dtype), options(tile, dtype), name=name)
    with torch.cuda.device(device):
        return Kernel(code, KERNEL, tile.shared_bytes)
