"""The instruction sets that the native step is built for, best first, and what this processor has of them."""

import ctypes
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

VARIABLE = "TRIODE_NATIVE_ISA"
"""Environment variable that names the instruction set to build for, for tests and for comparing."""

X86, ARM = "x86_64", "aarch64"
_PR_SVE_GET_VL, _SVE_LENGTH_MASK = 51, 0xFFFF
_SYS_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILEDATA = 158, 0x1023, 18
_GRANTED_TILES = "granted_tiles"


@dataclass(frozen=True, slots=True)
class InstructionSet:
    """One build of the sources."""

    name: str
    features: frozenset[str]
    """What the processor must have, as /proc/cpuinfo spells it; `sve256` is SVE with registers of 256 bits, and
    `granted_tiles` that the system lets this process use AMX's."""
    flags: tuple[str, ...]
    """What tells the compiler."""
    machine: str | None = None
    """Whose it is, as `platform.machine` spells it; None for every processor."""


_AVX2 = InstructionSet("avx2", frozenset({"avx2", "fma", "f16c"}), ("-mavx2", "-mfma", "-mf16c"), X86)
_AVX2_VNNI = InstructionSet("avx2_vnni", _AVX2.features | {"avx_vnni"}, (*_AVX2.flags, "-mavxvnni"), X86)
_AVX512 = InstructionSet(
    "avx512",
    _AVX2.features | {"avx512f", "avx512bw", "avx512dq", "avx512vl"},
    (*_AVX2.flags, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"),
    X86,
)
_AVX512_VNNI = InstructionSet("avx512_vnni", _AVX512.features | {"avx512_vnni"}, (*_AVX512.flags, "-mavx512vnni"), X86)
_AVX512_BF16 = InstructionSet(
    "avx512_bf16", _AVX512_VNNI.features | {"avx512_bf16"}, (*_AVX512_VNNI.flags, "-mavx512bf16"), X86
)
_AMX = InstructionSet(
    "amx",
    _AVX512_BF16.features | {"amx_tile", "amx_int8", "amx_bf16", _GRANTED_TILES},
    (*_AVX512_BF16.flags, "-mamx-tile", "-mamx-int8", "-mamx-bf16"),
    X86,
)
_NEON = InstructionSet("neon", frozenset({"asimd"}), ("-march=armv8-a",), ARM)
_NEON_DOT = InstructionSet("neon_dotprod", _NEON.features | {"asimddp"}, ("-march=armv8.2-a+dotprod",), ARM)
_NEON_I8MM = InstructionSet("neon_i8mm", _NEON_DOT.features | {"i8mm"}, ("-march=armv8.2-a+dotprod+i8mm",), ARM)
_NEON_BF16 = InstructionSet("neon_bf16", _NEON_I8MM.features | {"bf16"}, ("-march=armv8.2-a+dotprod+i8mm+bf16",), ARM)
# Where SVE's registers have the size of NEON's, it has nothing for us that NEON has not.
_SVE256 = InstructionSet(
    "sve256_bf16",
    _NEON_BF16.features | {"sve256"},
    ("-march=armv8.2-a+dotprod+i8mm+bf16+sve", "-msve-vector-bits=256"),
    ARM,
)
_SVE512 = InstructionSet("sve512", _NEON.features | {"sve512"}, ("-march=armv8.2-a+sve", "-msve-vector-bits=512"), ARM)
_PORTABLE = InstructionSet("portable", frozenset(), ())
INSTRUCTION_SETS = {
    isa.name: isa
    for isa in (
        *(_AMX, _AVX512_BF16, _AVX512_VNNI, _AVX512, _AVX2_VNNI, _AVX2),
        *(_SVE512, _SVE256, _NEON_BF16, _NEON_I8MM, _NEON_DOT, _NEON),
        _PORTABLE,
    )
}


@cache
def processor_info() -> Mapping[str, str]:
    """The first processor's entry of /proc/cpuinfo; empty where there is none."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return {}
    first, _, _ = path.read_text().partition("\n\n")
    pairs = (line.split(":", 1) for line in first.splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}


def features(info: Mapping[str, str], sve_bits: int, *, granted_tiles: bool = False) -> frozenset[str]:
    """What a processor has for this process.

    Args:
        info: its entry of /proc/cpuinfo.
        sve_bits: of SVE's registers; 0 where it has none.
        granted_tiles: whether the system lets this process use AMX's tiles.
    """
    words = info.get("flags", info.get("Features", "")).split()
    granted = {f"sve{sve_bits}"} if sve_bits else set()
    return frozenset(words) | granted | ({_GRANTED_TILES} if granted_tiles else set())


def _sve_bits() -> int:
    """Of the registers that the system gives this process."""
    if platform.machine() != ARM or platform.system() != "Linux":
        return 0
    length: int = ctypes.CDLL(None).prctl(_PR_SVE_GET_VL)
    # Without SVE it is -1.
    return 0 if length < 0 else (length & _SVE_LENGTH_MASK) * 8


@cache
def _ask_for_tiles() -> bool:
    """Have the system save AMX's tiles for the threads of this process; whether it does.

    Linux wants to be asked, as signal frames grow by 8 KiB. It refuses where some thread has a smaller signal stack of its
    own.
    """
    if "amx_tile" not in features(processor_info(), 0) or platform.system() != "Linux":
        return False
    answer: int = ctypes.CDLL(None).syscall(_SYS_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILEDATA)
    return answer == 0


def withheld() -> tuple[str, ...]:
    """What this processor has and the system does not let this process use."""
    if "amx_tile" not in features(processor_info(), 0) or _ask_for_tiles():
        return ()
    return (f"{_AMX.name}: the system does not let this process use the processor's tiles",)


def fitting(machine: str, has: frozenset[str]) -> tuple[InstructionSet, ...]:
    """Those that a processor of this machine, with these features, can run, best first."""
    return tuple(isa for isa in INSTRUCTION_SETS.values() if isa.machine in (None, machine) and isa.features <= has)


def supported() -> tuple[InstructionSet, ...]:
    """Those that this processor can run, best first."""
    machine = X86 if platform.machine() == "AMD64" else platform.machine()
    return fitting(machine, features(processor_info(), _sve_bits(), granted_tiles=_ask_for_tiles()))


def candidates() -> tuple[InstructionSet, ...]:
    """Those to build, best first: the one that the environment names, or all that this processor can run.

    Raises:
        ValueError: the environment names one that does not exist or that this processor lacks.
    """
    possible = {isa.name: isa for isa in supported()}
    name = os.environ.get(VARIABLE)
    if name is None:
        return tuple(possible.values())
    if name not in possible:
        raise ValueError(f"{VARIABLE} must be one of {', '.join(possible)} on this processor, got {name!r}")
    return (possible[name],)


def processor_name() -> str:
    """What the compiler tunes for."""
    info = processor_info()
    # ARM's have numbers.
    numbers = " ".join(info[key] for key in ("CPU implementer", "CPU part", "CPU variant") if key in info)
    return info.get("model name") or numbers or platform.machine()
