"""Which kernels the doctor names for a GPU, without one."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from triode.engine.cli import doctor
from triode.kernels.hopper_product import nvrtc
from triode.kernels.hopper_product.errors import ProductUnavailable
from triode.kernels.linear import blas
from triode.models import loader


def kernels_on(capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    monkeypatch.setattr(loader, "resolve_device", lambda _: torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(blas, "describe_blas", lambda _: "cuBLASLt 13.1 in order")
    monkeypatch.setattr(nvrtc, "find_nvrtc", lambda: SimpleNamespace(version="13.0"))
    monkeypatch.setattr(doctor, "measure_reading", lambda _: 1e9)
    return doctor.examine().kernels


def test_hopper_alone_has_products_with_swiglu_and_of_half_precision_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = kernels_on((9, 0), monkeypatch)
    assert all("cuBLASLt 13.1 in order" in named for named in kernels.values())
    assert {dtype for dtype, named in kernels.items() if "CUDA C++ by NVRTC 13.0" in named} == {"bfloat16", "float16"}


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (10, 0), (12, 0)])
def test_no_other_gpu_has_them(capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = kernels_on(capability, monkeypatch)
    assert all("cuBLASLt 13.1 in order" in named and "CUDA C++" not in named for named in kernels.values())


def test_hopper_without_the_compiler_is_told_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent() -> None:
        raise ProductUnavailable("libnvrtc.so.13: cannot open shared object file")

    kernels_on((9, 0), monkeypatch)
    monkeypatch.setattr(nvrtc, "find_nvrtc", absent)
    told = doctor.examine().kernels["bfloat16"]
    why = (
        "no CUDA C++, which needs NVRTC (libnvrtc.so.13: cannot open shared object file), for those that were measured"
    )
    assert told.endswith(f"; {why}")
