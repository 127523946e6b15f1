"""Products of many tokens on a Hopper GPU, alone or with what comes next in one kernel: loads and launches `product.cu`.

M tokens    K in features    N out features    F half of a gate-up weight's out features
"""

import functools
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from ctypes import c_int, c_void_p

import torch

from triode.kernels.gpu_traits import GpuTraits
from triode.kernels.hopper_product.choice import MEASURED_SMS
from triode.kernels.hopper_product.driver import TENSOR_TYPES, Kernel, Launch, TensorMap
from triode.kernels.hopper_product.nvrtc import compiled
from triode.kernels.hopper_product.source import KERNEL, headers, options, source
from triode.kernels.hopper_product.tiles import GROUP, STEP_FEATURES, Ending, ProductTile

_GROUP_BYTES = 16
"""K is a multiple of a group, too, so that rows begin at multiples of so many bytes."""
_TOKEN_TILES_IN_L2 = 8
"""Cluster tiles of tokens whose inputs L2 holds while weights go by."""
_REMEMBERED = 4096


def takes(weight: torch.Tensor, bias: torch.Tensor | None, traits: GpuTraits) -> bool:
    """Whether the kernel reads such a weight, on a GPU that its tiles were measured with."""
    return (
        traits.warp_group_products
        and traits.num_sms == MEASURED_SMS
        and bias is None
        and weight.is_cuda
        and weight.dtype in (torch.bfloat16, torch.float16)
        and weight.is_contiguous()
        and weight.data_ptr() % _GROUP_BYTES == 0
    )


def hopper_product(
    x_MK: torch.Tensor,
    weight_NK: torch.Tensor,
    out_MN: torch.Tensor,
    tile: ProductTile,
    traits: GpuTraits,
    *,
    residual_MN: torch.Tensor | None = None,
) -> None:
    """Write `x @ weight.T` into `out_MN`, on torch's current stream; with a residual, write the sum of both.

    Any tile gives the same bits: those of the product, rounded, and of an addition that is rounded then.

    Raises:
        ValueError: the tensors are not laid out as the kernel reads them, or the residual is what is written.
        ProductUnavailable: the kernel cannot be compiled, loaded or launched.
    """
    ending = Ending.STORE if residual_MN is None else Ending.ADD
    _launch(x_MK, weight_NK, out_MN, residual_MN, tile, ending, traits)


def swiglu_product(
    x_MK: torch.Tensor, weight_2FK: torch.Tensor, out_MF: torch.Tensor, tile: ProductTile, traits: GpuTraits
) -> None:
    """Write `silu(gate) * up` of `x @ weight.T` into `out_MF`, on torch's current stream; gates first, then ups.

    Any tile gives the same bits: those of the product, rounded, and of `kernels/swiglu`.

    Raises:
        ValueError: the tensors are not laid out as the kernel reads them.
        ProductUnavailable: the kernel cannot be compiled, loaded or launched.
    """
    _launch(x_MK, weight_2FK, out_MF, None, tile, Ending.SWIGLU, traits)


def compile_tiles(ending: Ending, tiles: Iterable[ProductTile], dtype: torch.dtype) -> None:
    """Compile and keep what is not kept yet, all at a time: NVRTC takes up to a second for each.

    Raises:
        ProductUnavailable: one cannot be compiled.
    """
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda tile: _code(tile, ending, dtype), tiles))


def _launch(
    x_MK: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor,
    residual: torch.Tensor | None,
    tile: ProductTile,
    ending: Ending,
    traits: GpuTraits,
) -> None:
    _check(x_MK, weight, out, residual, ending)
    launch = _prepared(
        x_MK.data_ptr(),
        weight.data_ptr(),
        out.data_ptr(),
        0 if residual is None else residual.data_ptr(),
        (len(x_MK), out.shape[1], x_MK.shape[1]),
        x_MK.dtype,
        tile,
        ending,
        traits,
        out.device,
    )
    launch(torch.cuda.current_stream(out.device).cuda_stream)


def _check(
    x_MK: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, residual: torch.Tensor | None, ending: Ending
) -> None:
    (num_tokens, in_features), (num_rows, weight_features) = x_MK.shape, weight.shape
    group_rows = GROUP * ending.rows_of_feature
    if num_tokens == 0:
        raise ValueError("x must have at least one token, got 0")
    if num_rows % group_rows or weight_features % GROUP:
        raise ValueError(f"weight must be a multiple of {group_rows} × {GROUP}, got {num_rows} × {weight_features}")
    if in_features != weight_features:
        raise ValueError(f"x must have the weight's {weight_features} in features, got {in_features}")
    sizes = num_tokens, num_rows // ending.rows_of_feature
    tensors = {"x": x_MK, "weight": weight, "out": out}
    if residual is not None:
        tensors["residual"] = residual
        if residual.shape != sizes:
            raise ValueError(f"residual must be {sizes}, got {tuple(residual.shape)}")
        if residual.data_ptr() == out.data_ptr():
            # The last tiles of tokens overlap: what one of them adds, another one would add to.
            raise ValueError("residual must be elsewhere than out, got the same tensor")
    if out.shape != sizes:
        raise ValueError(f"out must be {sizes}, got {tuple(out.shape)}")
    for name, tensor in tensors.items():
        if tensor.dtype not in TENSOR_TYPES or tensor.dtype != weight.dtype:
            raise ValueError(f"{name} must be float16 or bfloat16, and all of one type, got {tensor.dtype}")
        if tensor.device != weight.device:
            raise ValueError(f"{name} must be on {weight.device}, where the weight is, got {tensor.device}")
        if not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()}")
        if tensor.data_ptr() % _GROUP_BYTES:
            raise ValueError(f"{name} must begin at a multiple of {_GROUP_BYTES} bytes, got {tensor.data_ptr():#x}")


@functools.lru_cache(maxsize=_REMEMBERED)
def _prepared(
    x: int,
    weight: int,
    out: int,
    residual: int,
    sizes: tuple[int, int, int],
    dtype: torch.dtype,
    tile: ProductTile,
    ending: Ending,
    traits: GpuTraits,
    device: torch.device,
) -> Launch:
    """Maps and arguments hold addresses alone, so that one product's are another's of the same place and size."""
    num_tokens, num_features, in_features = sizes
    row_bytes, kinds = in_features * dtype.itemsize, ending.rows_of_feature
    x_map = TensorMap(x, dtype, (in_features, num_tokens), (row_bytes,), (STEP_FEATURES, tile.fetched_tokens))
    # Eight rows and the next eight; or eight gates, their eight ups, the next eight gates.
    weight_map = TensorMap(
        weight,
        dtype,
        (in_features, GROUP, kinds, num_features // GROUP),
        (row_bytes, num_features * row_bytes, GROUP * row_bytes),
        (STEP_FEATURES, GROUP, kinds, tile.box_groups(ending)),
    )
    num_clusters = min(traits.num_sms // tile.cluster, tile.num_clusters(num_tokens, kinds * num_features))
    return Launch(
        _loaded(tile, ending, dtype, device),
        (x_map, weight_map, c_void_p(out), c_void_p(residual), *map(c_int, sizes), c_int(_TOKEN_TILES_IN_L2)),
        num_programs=tile.cluster * num_clusters,
        num_threads=tile.num_threads,
        cluster=tile.cluster,
        starts_early=traits.dependent_launch,
    )


def _code(tile: ProductTile, ending: Ending, dtype: torch.dtype) -> bytes:
    name = f"{ending.value}-{tile.tokens}x{tile.rows}"
    return compiled(source(), headers(tile, dtype), options(tile, ending, dtype), name=name)


@functools.cache
def _loaded(tile: ProductTile, ending: Ending, dtype: torch.dtype, device: torch.device) -> Kernel:
    with torch.cuda.device(device):
        return Kernel(_code(tile, ending, dtype), KERNEL, tile.shared_bytes)
