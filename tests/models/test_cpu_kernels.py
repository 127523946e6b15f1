"""Which kernels a CPU model gets: compiled ones where they can be had, and a reason where they cannot."""

import pytest
import torch

from native_steps import native_library
from tiny_decoders import tiny_config, tiny_weights
from triode.cache.config import CacheConfig
from triode.models.build import BuiltRunner, build_runner
from triode.models.config import KernelChoice, ModelOptions
from triode.models.cpu import describe_auto_kernels, find_native
from triode.models.quantization import Quantization, plan_weights


class Stages:
    """Counts stages that begin and end."""

    def __init__(self) -> None:
        self.open: list[str] = []
        self.names: list[str] = []

    def stage(self, name: str, total: int | None, unit: str) -> None:
        assert self.open == []
        self.open.append(name)
        self.names.append(name)

    def advance(self, amount: int) -> None:
        raise AssertionError("these stages have no length")

    def done(self) -> None:
        self.open.pop()


def built(
    kernels: KernelChoice,
    dtype: torch.dtype = torch.float32,
    stages: Stages | None = None,
    quantization: Quantization = "none",
) -> BuiltRunner:
    config = tiny_config(max_context_tokens=64)
    return build_runner(
        config,
        tiny_weights(config, dtype),
        cache_config=CacheConfig(),
        max_running=2,
        kernels=kernels,
        plan=plan_weights(quantization),
        progress=stages,
    )


def without_compiler(patch: pytest.MonkeyPatch) -> None:
    patch.setenv("CXX", "no-such-compiler-anywhere")


def test_native_kernels_are_taken_where_there_is_a_compiler() -> None:
    isa = native_library().isa
    stages = Stages()
    assert built("auto", stages=stages).kernels.startswith(f"native ({isa.name}): linear")
    assert stages.names == ["Preparing kernels"]
    assert describe_auto_kernels(torch.bfloat16, find_native(stages)).startswith(f"native ({isa.name}): linear")


def test_torch_operations_are_taken_when_asked_for() -> None:
    assert "native" not in built("reference").kernels


def test_without_a_compiler_torch_operations_are_taken_and_the_reason_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    without_compiler(monkeypatch)
    kernels = built("auto").kernels
    assert "reference: rms_norm" in kernels
    assert kernels.endswith("no native step: no C++ compiler: no-such-compiler-anywhere is not installed")
    assert describe_auto_kernels(torch.float32, find_native(Stages())) == kernels


def test_native_kernels_that_cannot_be_had_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"got 'native': native kernels compute in .* not in float16"):
        built("native", torch.float16)
    without_compiler(monkeypatch)
    with pytest.raises(ValueError, match=r"kernels must be auto or reference here, got 'native': no C\+\+ compiler"):
        built("native")


def test_quantised_weights_need_native_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    isa = native_library().isa.name
    assert f"native ({isa}, a16w8): linear" in built("auto", quantization="a16w8").kernels
    with pytest.raises(ValueError, match="quantization must be none with kernels='reference', got 'a16w8'"):
        built("reference", quantization="a16w8")
    without_compiler(monkeypatch)
    with pytest.raises(ValueError, match=r"quantization must be none here, got 'a16w8': no C\+\+ compiler"):
        built("auto", quantization="a16w8")


def test_an_unknown_choice_is_refused() -> None:
    with pytest.raises(ValueError, match="kernels must be one of auto, reference, native, got 'fast'"):
        ModelOptions(model="x", kernels="fast")  # type: ignore[arg-type]
