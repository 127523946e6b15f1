"""The compiled step with AMX's tiles, which plain C++ stands in for (`emulated_tiles.h`): a build for this very processor."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from hashlib import sha256
from pathlib import Path

from triode.kernels.native.build import build
from triode.kernels.native.isa import INSTRUCTION_SETS, InstructionSet, supported
from triode.kernels.native.library import NativeLibrary

AMX = INSTRUCTION_SETS["amx"]
TILES = Path(__file__).with_name("emulated_tiles.h")


def emulated_isa() -> InstructionSet:
    """What such a build is compiled for."""
    base = next(isa for isa in supported() if isa != AMX)
    # Builds are found by their command, which must change with the header.
    digest = sha256(TILES.read_bytes()).hexdigest()
    flags = (*base.flags, f"-DTRIODE_EMULATED_TILES=0x{digest[:8]}", "-include", str(TILES))
    return InstructionSet(AMX.name, base.features, flags, base.machine)


@cache
def emulated_amx() -> NativeLibrary:
    """The library; NativeUnavailable without a compiler."""
    library = NativeLibrary(str(build(emulated_isa(), lambda _: None)), AMX)
    library.check_products()
    return library


@contextmanager
def broken_tiles() -> Iterator[None]:
    """Their sums depend on how many rows there are."""
    path = str(build(emulated_isa(), lambda _: None))
    is_broken = ctypes.c_int.in_dll(ctypes.CDLL(path), "triode_tiles_are_broken")
    is_broken.value = 1
    try:
        yield
    finally:
        is_broken.value = 0
