"""Which build of the compiled step a processor gets: decided from what the system says of it, on any machine."""

import platform
from collections.abc import Callable
from pathlib import Path

import pytest

from native_steps import native_library
from triode.kernels.native import build as build_module
from triode.kernels.native import isa as isa_module
from triode.kernels.native import library
from triode.kernels.native.build import NativeUnavailable, UnknownInstructions, build, find_compiler, flags_for
from triode.kernels.native.isa import (
    ARM,
    INSTRUCTION_SETS,
    VARIABLE,
    X86,
    InstructionSet,
    candidates,
    features,
    fitting,
    withheld,
)

NEON = "fp asimd evtstrm aes pmull sha1 sha2 crc32"
DOT = f"{NEON} atomics fphp asimdhp asimdrdm asimddp"
MATRIX = f"{DOT} i8mm bf16"
AVX512 = "avx avx2 fma f16c avx512f avx512bw avx512dq avx512vl"
AMX = "avx512_vnni avx512_bf16 amx_tile amx_int8 amx_bf16"
# Machine, what /proc/cpuinfo lists, bits of SVE's registers; and the best set for it.
PROCESSORS = {
    "Cortex-A53": (ARM, NEON, 0, "neon"),
    "Neoverse N1": (ARM, DOT, 0, "neon_dotprod"),
    "with products of bytes": (ARM, f"{DOT} i8mm", 0, "neon_i8mm"),
    "Neoverse V1": (ARM, f"{MATRIX} sve", 256, "sve256_bf16"),
    "Neoverse V2": (ARM, f"{MATRIX} sve sve2", 128, "neon_bf16"),
    "A64FX": (ARM, f"{NEON} sve", 512, "sve512"),
    "ARM without a list": (ARM, "", 0, "portable"),
    "Zen 4": (X86, f"{AVX512} avx512_vnni avx512_bf16", 0, "avx512_bf16"),
    "Sapphire Rapids": (X86, f"{AVX512} {AMX}", 0, "amx"),
    "Haswell": (X86, "avx avx2 fma f16c", 0, "avx2"),
    "old x86": (X86, "sse sse2", 0, "portable"),
    "another": ("riscv64", MATRIX, 0, "portable"),
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_a_processor_gets_the_best_set_that_it_has(name: str) -> None:
    machine, words, sve_bits, best = PROCESSORS[name]
    key = "flags" if machine == X86 else "Features"
    possible = fitting(machine, features({key: words}, sve_bits, granted_tiles=True))
    assert possible[0].name == best
    assert possible[-1].name == "portable"
    assert {isa.machine for isa in possible} <= {machine, None}


def test_tiles_that_the_system_does_not_grant_are_not_used() -> None:
    possible = fitting(X86, features({"flags": f"{AVX512} {AMX}"}, 0, granted_tiles=False))
    assert possible[0].name == "avx512_bf16"


@pytest.mark.parametrize("isa", INSTRUCTION_SETS.values(), ids=list(INSTRUCTION_SETS))
def test_the_compiler_tunes_for_this_processor_on_its_own_machine_only(
    isa: InstructionSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    for machine in (X86, ARM):
        monkeypatch.setattr(platform, "machine", lambda machine=machine: machine)
        assert ("-mtune=native" in flags_for(isa)) == (isa.machine in (None, machine))
        assert set(isa.flags) <= set(flags_for(isa))


def test_a_set_that_the_compiler_does_not_know_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    native_library("portable")
    asked = []

    def old_compiler(isa: InstructionSet, announce: Callable[[str], None]) -> Path:
        asked.append(isa.name)
        if isa.flags:
            raise UnknownInstructions(f"unknown {isa.name}")
        return build(isa, announce)

    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(library, "build", old_compiler)
    assert library.load_library(lambda _: None).isa.name == asked[-1] == "portable"


def test_tiles_that_the_system_keeps_to_itself_are_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isa_module, "processor_info", lambda: {"flags": f"{AVX512} {AMX}"})
    monkeypatch.setattr(isa_module, "_ask_for_tiles", lambda: False)
    (reason,) = withheld()
    assert reason == "amx: the system does not let this process use the processor's tiles"
    monkeypatch.setattr(isa_module, "_ask_for_tiles", lambda: True)
    assert not withheld()
    monkeypatch.setattr(isa_module, "processor_info", lambda: {"flags": AVX512})
    assert not withheld()


def test_a_compiler_that_knows_no_set_at_all_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_compiler(isa: InstructionSet, _: Callable[[str], None]) -> Path:
        raise UnknownInstructions(f"unknown {isa.name}")

    monkeypatch.setattr(library, "build", no_compiler)
    with pytest.raises(UnknownInstructions, match=f"unknown {candidates()[0].name}"):
        library.load_library(lambda _: None)


def test_flags_that_the_compiler_does_not_know_are_told_from_sources_that_it_cannot_compile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    try:
        find_compiler()
    except NativeUnavailable as reason:
        pytest.skip(str(reason))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    strange = InstructionSet("strange", frozenset(), ("-mno-such-instructions",))
    with pytest.raises(UnknownInstructions, match="no-such-instructions"):
        build(strange, lambda _: None)
    sources = tmp_path / "sources"
    sources.mkdir()
    (sources / "step.cpp").write_text("#error nobody can compile this")
    monkeypatch.setattr(build_module, "SOURCES", sources)
    with pytest.raises(NativeUnavailable, match="nobody can compile this") as caught:
        build(INSTRUCTION_SETS["portable"], lambda _: None)
    assert caught.type is NativeUnavailable
