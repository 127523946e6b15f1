"""The compiled step in tests: for one instruction set or the best, or skipped where there is no compiler."""

from collections.abc import Mapping

import pytest
import torch

from triode.kernels.native.build import NativeUnavailable
from triode.kernels.native.isa import VARIABLE
from triode.kernels.native.library import NativeLibrary, load_library
from triode.models.config import ModelConfig
from triode.models.native import NativeDecoder
from triode.models.quantization import Quantization, plan_weights
from triode.models.weights import DecoderWeights


def native_library(isa: str | None = None) -> NativeLibrary:
    """The library, compiled if this machine has not compiled it yet."""
    with pytest.MonkeyPatch.context() as patch:
        if isa is not None:
            patch.setenv(VARIABLE, isa)
        try:
            return load_library(lambda _: None)
        except NativeUnavailable as reason:
            pytest.skip(str(reason))


def native_decoder(
    config: ModelConfig,
    weights: DecoderWeights,
    isa: str | None = None,
    quantization: Quantization = "none",
    group: int | None = None,
    overrides: Mapping[str, str] | None = None,
) -> NativeDecoder:
    """A decoder of it."""
    plan = plan_weights(quantization, group, overrides)
    with torch.inference_mode():
        return NativeDecoder(config, weights, native_library(isa), plan=plan)
