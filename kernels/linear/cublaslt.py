"""cuBLASLt itself, called by `ctypes`: products that never split K, by an algorithm that is named here.

The idea. torch takes the one algorithm that cuBLASLt's heuristic proposes, and refuses split-K through switches of the whole
process. Called directly, cuBLASLt takes any of its kernels (a tile, a cluster of multiprocessors, an option that says who
takes which tile), and no other product of the process is touched. Hopper's own kernels, as long as they do not split K, add
in the same order, so which of them serves is only ever a matter of speed: `algorithms.py` names the measured ones. Kernels
of older families may add in another order, so on Hopper they serve only where the heuristic proposes none of its own.

cuBLASLt thinks in columns: row-major `out = x Wᵀ` is its `out = Wᵀ x`, where W has K rows and N columns, x K and M, out N
and M. Names and numbers are those of `cublasLt.h`.

M tokens    K in features    N out features
"""

import ctypes
import functools
import os
from ctypes import byref, c_char_p, c_float, c_int, c_int64, c_size_t, c_uint16, c_uint32, c_uint64, c_void_p
from pathlib import Path
from typing import TypeAlias

import torch

from triode.kernels.linear.algorithms import Algorithm, measured_algorithm

_DATA_TYPES = {torch.float32: 0, torch.float16: 2, torch.bfloat16: 14}
_SUM_IN_FLOAT32 = 68
_TRANSPOSE_A, _EPILOGUE, _BIAS_POINTER = 3, 7, 8
_EPILOGUE_BIAS = 4
_MOST_WORKSPACE_BYTES, _REDUCTIONS, _ALIGNMENTS = 1, 3, (5, 6, 7, 8)
_BEST_ALIGNMENT, _NAMED_ALIGNMENT = 256, 16
# As torch offers by itself: with 32 MiB the heuristic proposes, for few tokens and many in features, kernels that take 400
# instead of 55 µs.
_WORKSPACE_BYTES = 1 << 20
_HOPPER, _HOPPER_KERNELS = (9, 0), 66
_MOST_PROPOSALS = 8
_KERNELS, _TILE, _CLUSTER, _OPTION, _STAGES, _SPLITS, _REDUCTION = 0, 1, 8, 5, 6, 2, 3
_STAGES_OF_64 = 35
_REMEMBERED = 4096

# Opaque structures that the caller may keep in its own memory: layouts and preferences of 64 bytes, products of 256.
_Small: TypeAlias = "ctypes.Array[c_uint64]"


class CublasLtError(RuntimeError):
    """cuBLASLt refused a call."""


class _Proposal(ctypes.Structure):
    """`cublasLtMatmulHeuristicResult_t`."""

    _fields_ = [
        ("algorithm", c_uint64 * 8),
        ("workspace_bytes", c_size_t),
        ("status", c_int),
        ("waves", c_float),
        ("reserved", c_int * 4),
    ]


_ONE, _ZERO = c_float(1), c_float(0)


def loaded_library(name: str = "libcublasLt.so") -> str | None:
    """The path of a library of that name, by default the libcublasLt, that torch has loaded with its CUDA libraries."""
    maps = Path("/proc/self/maps")
    lines = os.fsdecode(maps.read_bytes()).split("\n") if maps.exists() else []
    # A path, in which there may be blanks and what is not text, is a line's sixth field.
    return next((line.split(maxsplit=5)[-1] for line in lines if f"/{name}" in line), None)


def _alignment_bytes(*tensors: torch.Tensor) -> int:
    """What all addresses are multiples of, at most what cuBLASLt asks about."""
    addresses = functools.reduce(int.__or__, (tensor.data_ptr() for tensor in tensors), _BEST_ALIGNMENT)
    return addresses & -addresses


class CublasLt:
    """The library, and one device's handle. Any number of threads and streams may use it."""

    def __init__(self, path: str, device: torch.device) -> None:
        """Load what is loaded already, and create a handle.

        Raises:
            OSError, AttributeError: the library is not there, or lacks a function.
            CublasLtError: it cannot be used on this device.
        """
        self._library = ctypes.CDLL(path)
        self._library.cublasLtGetStatusName.restype = c_char_p
        self._library.cublasLtGetVersion.restype = c_size_t
        self._matmul = self._library.cublasLtMatmul
        self._matmul.argtypes = [c_void_p] * 14 + [c_size_t, c_void_p]
        self._device = device
        self._on_hopper = torch.cuda.get_device_capability(device) == _HOPPER
        self.not_offered: set[tuple[int, int, Algorithm]] = set()
        """Out features, in features and name of what a table names for this GPU, and this library does not have."""
        self._handle = c_void_p()
        with torch.cuda.device(device):
            self._call("cublasLtCreate", byref(self._handle))
        self._plan = functools.lru_cache(maxsize=_REMEMBERED)(self._new_plan)

    @property
    def version(self) -> str:
        """As in 13.1.0."""
        number = self._library.cublasLtGetVersion()
        return f"{number // 10000}.{number // 100 % 100}.{number % 100}"

    def multiply(
        self,
        x_MK: torch.Tensor,
        weight_NK: torch.Tensor,
        out_MN: torch.Tensor,
        bias_N: torch.Tensor | None = None,
        *,
        algorithm: Algorithm | None = None,
    ) -> None:
        """Write `x @ weight.T (+ bias)` into `out_MN`, on torch's current stream. The bias is added before rounding.

        Args:
            algorithm: takes the place of the one that is named for this shape.

        Raises:
            ValueError: a tensor's features are not side by side, or sizes or types do not go together.
            CublasLtError: no kernel computes this without splitting K, or not the one that was asked for.
        """
        if not x_MK.stride(1) == weight_NK.stride(1) == out_MN.stride(1) == 1:
            raise ValueError("x, weight and out must be contiguous along their last axis")
        plan = self._plan(
            (*x_MK.shape, *weight_NK.shape, *out_MN.shape),
            (x_MK.stride(0), weight_NK.stride(0), out_MN.stride(0)),
            (x_MK.dtype, weight_NK.dtype, out_MN.dtype),
            _alignment_bytes(x_MK, weight_NK, out_MN),
            None if bias_N is None else bias_N.data_ptr(),
            algorithm,
        )
        workspace = None
        if plan.workspace_bytes:
            # Torch's allocator keeps it for this stream until the product is done.
            workspace = torch.empty(plan.workspace_bytes, dtype=torch.uint8, device=self._device)
        status = self._matmul(
            self._handle,
            plan.product,
            byref(_ONE),
            weight_NK.data_ptr(),
            plan.weight,
            x_MK.data_ptr(),
            plan.x,
            byref(_ZERO),
            out_MN.data_ptr(),
            plan.out,
            out_MN.data_ptr(),
            plan.out,
            plan.algorithm,
            None if workspace is None else workspace.data_ptr(),
            plan.workspace_bytes,
            torch.cuda.current_stream(self._device).cuda_stream,
        )
        if status:
            raise CublasLtError(f"cublasLtMatmul: {self._name(status)}, for {plan}")

    def _new_plan(
        self,
        shapes: tuple[int, ...],
        strides: tuple[int, int, int],
        dtypes: tuple[torch.dtype, torch.dtype, torch.dtype],
        alignment_bytes: int,
        bias_address: int | None,
        algorithm: Algorithm | None,
    ) -> "_Plan":
        # Here, so that a product that was made before is not checked again.
        shape = _checked_shape(shapes, dtypes)
        return _Plan(self, shape, strides, (dtypes[0], dtypes[2]), alignment_bytes, bias_address, algorithm)

    def _call(self, name: str, *arguments: object) -> None:
        if status := getattr(self._library, name)(*arguments):
            raise CublasLtError(f"{name}: {self._name(status)}")

    def _name(self, status: int) -> str:
        return str(self._library.cublasLtGetStatusName(status).decode())


def _checked_shape(
    shapes: tuple[int, ...], dtypes: tuple[torch.dtype, torch.dtype, torch.dtype]
) -> tuple[int, int, int]:
    """M, N and K of x, weight and out, of which each has two sizes and a type."""
    num_tokens, x_features, out_features, in_features, *out_sizes = shapes
    x_dtype, weight_dtype, out_dtype = dtypes
    if x_features != in_features:
        raise ValueError(f"x must have the weight's {in_features} in features, got {x_features}")
    if out_sizes != [num_tokens, out_features]:
        raise ValueError(f"out must have the sizes ({num_tokens}, {out_features}), got {tuple(out_sizes)}")
    if weight_dtype != x_dtype:
        raise ValueError(f"the weight's type must be that of x, {x_dtype}, got {weight_dtype}")
    for name, dtype in (("x", x_dtype), ("out", out_dtype)):
        if dtype not in _DATA_TYPES:
            raise ValueError(f"{name} must be of {', '.join(map(str, _DATA_TYPES))}, got {dtype}")
    return num_tokens, out_features, in_features


class _Plan:
    """What cuBLASLt is told of a product: its layouts, and the algorithm."""

    def __init__(
        self,
        lt: CublasLt,
        shape: tuple[int, int, int],
        strides: tuple[int, int, int],
        dtypes: tuple[torch.dtype, torch.dtype],
        alignment_bytes: int,
        bias_address: int | None,
        asked: Algorithm | None,
    ) -> None:
        self._lt, self._shape, self._dtypes, self._alignment_bytes = lt, shape, dtypes, alignment_bytes
        num_tokens, out_features, in_features = shape
        x_type, out_type = (_DATA_TYPES[dtype] for dtype in dtypes)
        self.product = self._describe_product(bias_address)
        self.weight = self._layout(x_type, in_features, out_features, strides[1])
        self.x = self._layout(x_type, in_features, num_tokens, strides[0])
        self.out = self._layout(out_type, out_features, num_tokens, strides[2])
        measured = measured_algorithm(out_features, in_features, num_tokens) if lt._on_hopper else None
        named = (asked or measured) if alignment_bytes >= _NAMED_ALIGNMENT else None
        chosen = self._offered(named) if named else None
        if chosen is None:
            if asked:
                raise CublasLtError(f"{asked} is not offered for {self}")
            if named:
                lt.not_offered.add((out_features, in_features, named))
            chosen = self._proposed()
        self.algorithm, self.workspace_bytes = chosen.algorithm, chosen.workspace_bytes

    def __str__(self) -> str:
        num_tokens, out_features, in_features = self._shape
        return f"{num_tokens} tokens of {in_features} features by {out_features}, {' to '.join(map(str, self._dtypes))}"

    def _describe_product(self, bias_address: int | None) -> _Small:
        product = (c_uint64 * 32)()
        self._call("cublasLtMatmulDescInit_internal", product, c_size_t(256), _SUM_IN_FLOAT32, 0)
        attributes: list[tuple[int, c_int | c_void_p]] = [(_TRANSPOSE_A, c_int(1))]
        if bias_address is not None:
            attributes += [(_EPILOGUE, c_int(_EPILOGUE_BIAS)), (_BIAS_POINTER, c_void_p(bias_address))]
        for attribute, value in attributes:
            size = c_size_t(ctypes.sizeof(value))
            self._call("cublasLtMatmulDescSetAttribute", product, attribute, byref(value), size)
        return product

    def _layout(self, data_type: int, num_rows: int, num_columns: int, stride: int) -> _Small:
        layout = (c_uint64 * 8)()
        sizes = (c_size_t(64), data_type, c_uint64(num_rows), c_uint64(num_columns), c_int64(stride))
        self._call("cublasLtMatrixLayoutInit_internal", layout, *sizes)
        return layout

    def _offered(self, named: Algorithm) -> _Proposal | None:
        """The algorithm of that name; None where this cuBLASLt or this GPU does not have it."""
        proposal = _Proposal()
        handle, library, algorithm = self._lt._handle, self._lt._library, proposal.algorithm
        x_type, out_type = (_DATA_TYPES[dtype] for dtype in self._dtypes)
        types = (_SUM_IN_FLOAT32, 0, x_type, x_type, out_type, out_type)
        status = library.cublasLtMatmulAlgoInit(handle, *types, _HOPPER_KERNELS, algorithm)
        for attribute, value in (
            (_TILE, c_uint32(named.tile_id)),
            (_STAGES, c_uint32(_STAGES_OF_64)),
            (_CLUSTER, c_uint16(named.cluster_id)),
            (_OPTION, c_uint32(named.option)),
        ):
            size = c_size_t(ctypes.sizeof(value))
            status = status or library.cublasLtMatmulAlgoConfigSetAttribute(algorithm, attribute, byref(value), size)
        layouts = (self.weight, self.x, self.out, self.out)
        status = status or library.cublasLtMatmulAlgoCheck(handle, self.product, *layouts, algorithm, byref(proposal))
        return None if status or proposal.workspace_bytes > _WORKSPACE_BYTES else proposal

    def _proposed(self) -> _Proposal:
        """The heuristic's first that does not split K; on Hopper its own kernels come before others."""
        preference = self._preference()
        usable: list[_Proposal] = []
        # Its first is all that most products ask for.
        for num_asked in (1, _MOST_PROPOSALS):
            usable += [each for each in self._proposals(preference, num_asked) if not self._splits(each)]
            for each in usable:
                if not self._lt._on_hopper or self._setting(each, _KERNELS) == _HOPPER_KERNELS:
                    return each
        if not usable:
            raise CublasLtError(f"no kernel keeps K in order for {self}")
        return usable[0]

    def _preference(self) -> _Small:
        preference = (c_uint64 * 8)()
        self._call("cublasLtMatmulPreferenceInit_internal", preference, c_size_t(64))
        attributes: list[tuple[int, c_uint64 | c_uint32]] = [
            (_MOST_WORKSPACE_BYTES, c_uint64(_WORKSPACE_BYTES)),
            (_REDUCTIONS, c_uint32(0)),
        ]
        attributes += [(operand, c_uint32(self._alignment_bytes)) for operand in _ALIGNMENTS]
        for attribute, value in attributes:
            size = c_size_t(ctypes.sizeof(value))
            self._call("cublasLtMatmulPreferenceSetAttribute", preference, attribute, byref(value), size)
        return preference

    def _proposals(self, preference: _Small, num_asked: int) -> list[_Proposal]:
        proposals, num_proposals = (_Proposal * num_asked)(), c_int()
        layouts = (self.weight, self.x, self.out, self.out)
        self._call(
            "cublasLtMatmulAlgoGetHeuristic", self._lt._handle, self.product, *layouts, preference,
            num_asked, byref(proposals), byref(num_proposals),
        )  # fmt: skip
        return [proposal for proposal in proposals[: num_proposals.value] if not proposal.status]

    def _splits(self, proposal: _Proposal) -> bool:
        return self._setting(proposal, _SPLITS) > 1 or self._setting(proposal, _REDUCTION) != 0

    def _setting(self, proposal: _Proposal, attribute: int) -> int:
        value, size = c_int(), c_size_t()
        arguments = (proposal.algorithm, attribute, byref(value), c_size_t(4), byref(size))
        self._call("cublasLtMatmulAlgoConfigGetAttribute", *arguments)
        return value.value

    def _call(self, name: str, *arguments: object) -> None:
        self._lt._call(name, *arguments)
