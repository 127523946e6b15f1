"""Matrix products whose sums run over K in order, for every number of tokens: cuBLASLt without split-K.

cuBLAS splits K when there are too few tiles to fill the GPU, and then a token's bits depend on its neighbours. Where the
libcublasLt that torch has loaded is found, products call it themselves (`cublaslt.py`), and nothing else in the process
changes. Otherwise torch computes them, which refuses split-K only through switches of the whole process, and would slow an
embedding application's own small products: `split_k_refused` sets them while anyone is inside, and the last one to leave
puts back what the first one found.
"""

import contextlib
import threading
from collections.abc import Iterator

import torch

from triode.kernels.linear.cublaslt import CublasLt, CublasLtError, loaded_library

_LOCK = threading.Lock()
_LOADED: dict[torch.device, CublasLt] = {}
_SWITCHED = contextlib.ExitStack()
_num_inside = 0


@contextlib.contextmanager
def in_order(device: torch.device) -> Iterator[None]:
    """Inside, `linear_blas` never splits K. Any number of users may be inside, in any order of entering and leaving."""
    with contextlib.nullcontext() if isinstance(blas_of(device), CublasLt) else split_k_refused():
        yield


def describe_blas(device: torch.device) -> str:
    """Who computes products in order, what it takes, and how many named kernels were asked for and are not there."""
    found = blas_of(device)
    if isinstance(found, CublasLt):
        missing = f" ({len(found.not_offered)} named kernels are not offered)" if found.not_offered else ""
        return f"cuBLASLt {found.version} in order{missing}"
    return f"cuBLASLt in order, by torch's switches of the whole process ({found})"


def blas_of(device: torch.device) -> CublasLt | str:
    """The library for a device, or why torch must be asked instead. What failed may succeed when it is asked again."""
    if str(device) == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    with _LOCK:
        if device in _LOADED:
            return _LOADED[device]
        path = loaded_library()
        if path is None:
            return "no libcublasLt is loaded"
        try:
            _LOADED[device] = CublasLt(path, device)
        except (OSError, AttributeError, CublasLtError) as error:
            return f"{path}: {error}"
        return _LOADED[device]


@contextlib.contextmanager
def split_k_refused() -> Iterator[None]:
    """Every product of this process goes to cuBLASLt, which may neither split K nor sum in reduced precision.

    Any number of users may be inside, in any order of entering and leaving.
    """
    global _num_inside
    with _LOCK:
        if _num_inside == 0:
            _SWITCHED.enter_context(_switched())
        _num_inside += 1
    try:
        yield
    finally:
        with _LOCK:
            _num_inside -= 1
            if _num_inside == 0:
                _SWITCHED.close()


@contextlib.contextmanager
def _switched() -> Iterator[None]:
    matmul = torch.backends.cuda.matmul
    library = torch.backends.cuda.preferred_blas_library()
    bf16 = (matmul.allow_bf16_reduced_precision_reduction, matmul.allow_bf16_reduced_precision_reduction_split_k)
    fp16 = (matmul.allow_fp16_reduced_precision_reduction, matmul.allow_fp16_reduced_precision_reduction_split_k)
    torch.backends.cuda.preferred_blas_library("cublaslt")
    matmul.allow_bf16_reduced_precision_reduction = (False, False)
    matmul.allow_fp16_reduced_precision_reduction = (False, False)
    try:
        yield
    finally:
        matmul.allow_fp16_reduced_precision_reduction = fp16
        matmul.allow_bf16_reduced_precision_reduction = bf16
        torch.backends.cuda.preferred_blas_library(library)


def linear_blas(
    x_MK: torch.Tensor, weight_NK: torch.Tensor, out_MN: torch.Tensor, bias_N: torch.Tensor | None = None
) -> None:
    """Write `x @ weight.T (+ bias)` into `out_MN`, which may be float32. In order of K inside `in_order`.

    Raises:
        CublasLtError: cuBLASLt has no kernel for this that keeps K in order.
    """
    if out_MN.is_meta:
        # Nothing is compiled here, and torch would import a great deal to tell the shape of a product.
        return
    # What `in_order` has found: nothing is searched for, and no handle created, between two products or in a capture.
    blas = _LOADED.get(out_MN.device)
    if blas is None:
        linear_torch(x_MK, weight_NK, out_MN, bias_N)
    elif bias_N is None or bias_N.dtype == out_MN.dtype:
        blas.multiply(x_MK, weight_NK, out_MN, bias_N)
    else:
        blas.multiply(x_MK, weight_NK, out_MN)
        out_MN += bias_N


def linear_torch(
    x_MK: torch.Tensor, weight_NK: torch.Tensor, out_MN: torch.Tensor, bias_N: torch.Tensor | None = None
) -> None:
    """The same by torch. In order of K inside `split_k_refused`."""
    if out_MN.dtype == x_MK.dtype:
        if bias_N is None:
            torch.mm(x_MK, weight_NK.t(), out=out_MN)
        else:
            torch.addmm(bias_N, x_MK, weight_NK.t(), out=out_MN)
        return
    torch.mm(x_MK, weight_NK.t(), out_dtype=out_MN.dtype, out=out_MN)
    if bias_N is not None:
        out_MN += bias_N
