"""The instruction sets that the native step is built for, best first, and what this processor has of them."""

import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

VARIABLE = "TRIODE_NATIVE_ISA"
"""Environment variable that names the instruction set to build for, for tests and for comparing."""


@dataclass(frozen=True, slots=True)
class InstructionSet:
    """One build of the sources."""

    name: str
    features: frozenset[str]
    """What the processor must have, as /proc/cpuinfo spells it."""
    flags: tuple[str, ...]
    """What tells the compiler."""


_AVX2 = InstructionSet("avx2", frozenset({"avx2", "fma", "f16c"}), ("-mavx2", "-mfma", "-mf16c"))
_AVX2_VNNI = InstructionSet("avx2_vnni", _AVX2.features | {"avx_vnni"}, (*_AVX2.flags, "-mavxvnni"))
_AVX512 = InstructionSet(
    "avx512",
    _AVX2.features | {"avx512f", "avx512bw", "avx512dq", "avx512vl"},
    (*_AVX2.flags, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"),
)
_AVX512_VNNI = InstructionSet("avx512_vnni", _AVX512.features | {"avx512_vnni"}, (*_AVX512.flags, "-mavx512vnni"))
_AVX512_BF16 = InstructionSet(
    "avx512_bf16", _AVX512_VNNI.features | {"avx512_bf16"}, (*_AVX512_VNNI.flags, "-mavx512bf16")
)
_PORTABLE = InstructionSet("portable", frozenset(), ())
INSTRUCTION_SETS = {isa.name: isa for isa in (_AVX512_BF16, _AVX512_VNNI, _AVX512, _AVX2_VNNI, _AVX2, _PORTABLE)}


@cache
def processor_info() -> Mapping[str, str]:
    """The first processor's entry of /proc/cpuinfo; empty where there is none."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return {}
    first, _, _ = path.read_text().partition("\n\n")
    pairs = (line.split(":", 1) for line in first.splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}


def supported() -> tuple[InstructionSet, ...]:
    """Those that this processor can run, best first."""
    features = set(processor_info().get("flags", "").split())
    return tuple(isa for isa in INSTRUCTION_SETS.values() if isa.features <= features)


def chosen() -> InstructionSet:
    """The best one, or the one that the environment names.

    Raises:
        ValueError: the environment names one that does not exist or that this processor lacks.
    """
    possible = {isa.name: isa for isa in supported()}
    name = os.environ.get(VARIABLE)
    if name is None:
        return next(iter(possible.values()))
    if name not in possible:
        raise ValueError(f"{VARIABLE} must be one of {', '.join(possible)} on this processor, got {name!r}")
    return possible[name]


def processor_name() -> str:
    """What the compiler tunes for."""
    return processor_info().get("model name", platform.machine())
