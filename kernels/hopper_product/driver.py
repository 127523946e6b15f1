"""The CUDA driver, by ctypes: machine code to a kernel that can be launched, and maps by which the copy engine reads.

Torch has made a context current in every thread that computes on a device. Names and numbers are those of `cuda.h`.
"""

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, addressof, byref, c_char, c_char_p, c_int, c_uint32, c_uint64, c_void_p
from functools import cache

import torch

from triode.kernels.hopper_product.errors import ProductUnavailable

TENSOR_TYPES = {torch.float16: 6, torch.bfloat16: 9}
"""What the copy engine calls the types that the kernel takes."""
_NOT_INTERLEAVED, _SWIZZLE_128_BYTES, _FETCH_256_BYTES, _ZEROS_OUTSIDE = 0, 3, 3, 0
_MAP_BYTES, _MAP_ALIGNMENT = 128, 64
_MOST_DYNAMIC_SHARED_BYTES = 8
_CLUSTER_DIMENSION, _STARTS_BEFORE_THE_LAST_ENDS = 4, 6


class _Attribute(ctypes.Structure):
    """`CUlaunchAttribute`."""

    _fields_ = (("id", c_int), ("padding", c_char * 4), ("value", c_uint32 * 16))


class _Config(ctypes.Structure):
    """`CUlaunchConfig`."""

    _fields_ = (
        ("grid", c_uint32 * 3),
        ("block", c_uint32 * 3),
        ("shared_bytes", c_uint32),
        ("stream", c_void_p),
        ("attributes", POINTER(_Attribute)),
        ("num_attributes", c_uint32),
    )


class TensorMap:
    """How the copy engine reads boxes of a tensor, into rows of 128 bytes that it swizzles; zeros outside."""

    def __init__(
        self,
        address: int,
        dtype: torch.dtype,
        sizes: Sequence[int],
        strides_bytes: Sequence[int],
        box: Sequence[int],
    ) -> None:
        """Sizes, strides and box begin with the axis whose elements lie side by side; its stride is not told.

        Raises:
            ProductUnavailable: the driver does not take them.
        """
        self._memory = ctypes.create_string_buffer(_MAP_BYTES + _MAP_ALIGNMENT)
        self.address = -(-addressof(self._memory) // _MAP_ALIGNMENT) * _MAP_ALIGNMENT
        rank = len(sizes)
        driver().call(
            "cuTensorMapEncodeTiled",
            c_void_p(self.address),
            TENSOR_TYPES[dtype],
            c_uint32(rank),
            c_void_p(address),
            (c_uint64 * rank)(*sizes),
            (c_uint64 * (rank - 1))(*strides_bytes),
            (c_uint32 * rank)(*box),
            (c_uint32 * rank)(*[1] * rank),
            _NOT_INTERLEAVED,
            _SWIZZLE_128_BYTES,
            _FETCH_256_BYTES,
            _ZEROS_OUTSIDE,
        )


class Kernel:
    """A kernel in the current context. It stays loaded for as long as the process lives, like Triton's."""

    def __init__(self, code: bytes, name: str, shared_bytes: int) -> None:
        """Load it.

        Raises:
            ProductUnavailable: the driver does not take it.
        """
        module, self.function, self.shared_bytes = c_void_p(), c_void_p(), shared_bytes
        driver().call("cuModuleLoadData", byref(module), code)
        driver().call("cuModuleGetFunction", byref(self.function), module, name.encode())
        driver().call("cuFuncSetAttribute", self.function, _MOST_DYNAMIC_SHARED_BYTES, shared_bytes)


class Launch:
    """A kernel with its arguments, which are not copied before it is called."""

    def __init__(
        self,
        kernel: Kernel,
        arguments: Sequence[TensorMap | c_void_p | c_int],
        *,
        num_programs: int,
        num_threads: int,
        cluster: int,
        starts_early: bool,
    ) -> None:
        """`starts_early`: while its predecessor drains (programmatic dependent launch)."""
        self._arguments = arguments
        addresses = (each.address if isinstance(each, TensorMap) else addressof(each) for each in arguments)
        self._addresses = (c_void_p * len(arguments))(*addresses)
        attributes = (_Attribute * 2)()
        attributes[0].id, attributes[0].value[:3] = _CLUSTER_DIMENSION, [cluster, 1, 1]
        attributes[1].id, attributes[1].value[:1] = _STARTS_BEFORE_THE_LAST_ENDS, [int(starts_early)]
        self._config = _Config((num_programs, 1, 1), (num_threads, 1, 1), kernel.shared_bytes, None, attributes, 2)
        self._kernel, self._launch = kernel, driver().launch

    def __call__(self, stream: int) -> None:
        """Launch it on a stream, which may be under capture.

        Raises:
            ProductUnavailable: the driver refuses.
        """
        self._config.stream = stream
        if status := self._launch(self._config, self._kernel.function, self._addresses, None):
            raise ProductUnavailable(f"cuLaunchKernelEx: {driver().words(status)}")


class _Driver:
    def __init__(self) -> None:
        try:
            self._library = ctypes.CDLL("libcuda.so.1")
            self.launch = self._library.cuLaunchKernelEx
            self.launch.argtypes = [POINTER(_Config), c_void_p, POINTER(c_void_p), c_void_p]
        except (OSError, AttributeError) as error:
            raise ProductUnavailable(f"the CUDA driver: {error}") from error

    def call(self, name: str, *arguments: object) -> None:
        try:
            status = getattr(self._library, name)(*arguments)
        except AttributeError as error:
            raise ProductUnavailable(f"the CUDA driver: {error}") from error
        if status:
            raise ProductUnavailable(f"{name}: {self.words(status)}")

    def words(self, status: int) -> str:
        text = c_char_p()
        self._library.cuGetErrorString(status, byref(text))
        return text.value.decode() if text.value else f"error {status}"


@cache
def driver() -> _Driver:
    """The loaded library.

    Raises:
        ProductUnavailable: there is none, or it is older than Hopper.
    """
    return _Driver()
