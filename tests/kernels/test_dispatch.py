import pytest
import torch

from triode.kernels.dispatch import choose_kernels


def test_every_operation_names_its_implementation() -> None:
    kernels = choose_kernels(torch.device("cpu"), torch.float32)
    names = kernels.names
    assert names["linear"] in {"onednn", "torch"}
    assert kernels.exceptions() == []
    assert set(names) == {"linear", "rms_norm", "rotary", "store_kv", "swiglu", "paged_attention"}


def test_a_dtype_without_kernels_is_refused() -> None:
    with pytest.raises(ValueError, match="dtype must be float32, bfloat16 or float16, got"):
        choose_kernels(torch.device("cpu"), torch.float64)
