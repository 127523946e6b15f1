"""The compiled step in tests: for one instruction set or the best, or skipped where there is no compiler.

With TRIODE_EMULATE=aarch64 in the environment, all of them are ARM's, and run under an emulator (`make test-aarch64`). With
TRIODE_EMULATE=amx there is only AMX, whose tiles C++ stands in for (`make test-amx`).
"""

import os
from collections.abc import Mapping

import pytest
import torch

from emulated_amx import AMX, emulated_amx
from triode.kernels.native.build import NativeUnavailable
from triode.kernels.native.isa import VARIABLE, supported
from triode.kernels.native.library import NativeLibrary, load_library
from triode.models.config import ModelConfig
from triode.models.native import NativeDecoder
from triode.models.quantization import Quantization, plan_weights
from triode.models.weights import DecoderWeights

EMULATES = os.environ.get("TRIODE_EMULATE") == "aarch64"
if EMULATES:
    from emulated_arm import PROCESSORS, emulated

    ISAS = list(PROCESSORS)
elif os.environ.get("TRIODE_EMULATE") == AMX.name:
    ISAS = [AMX.name]
else:
    ISAS = [isa.name for isa in supported()]
"""Names of the instruction sets that tests meet, best first."""


def native_library(isa: str | None = None) -> NativeLibrary:
    """The library, compiled if this machine has not compiled it yet."""
    if EMULATES:
        return emulated(isa or "neon_bf16")
    if (isa or ISAS[0]) == AMX.name and AMX not in supported():
        try:
            return emulated_amx()
        except NativeUnavailable as reason:
            pytest.skip(str(reason))
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
