"""Compiles kernels for a GPU that is not there, by running their launchers with a driver that never launches.

What is compiled is exactly what the launcher would launch on such a GPU: its constants, types and specialisations.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from triode.kernels.gpu_traits import GpuTraits

AMPERE = GpuTraits(num_sms=108, shared_memory_bytes=163 * 1024, dependent_launch=False, has_fp8=False)
ADA = GpuTraits(num_sms=128, shared_memory_bytes=99 * 1024, dependent_launch=False, has_fp8=True)
HOPPER = GpuTraits(
    num_sms=132, shared_memory_bytes=227 * 1024, dependent_launch=True, has_fp8=True, warp_group_products=True
)
_CAPABILITIES = {AMPERE: 80, ADA: 89, HOPPER: 90}


def fits(compiled: list[Any], traits: GpuTraits) -> bool:
    """Whether there are kernels, and none asks for more shared memory than the GPU has."""
    return bool(compiled) and all(kernel.metadata.shared <= traits.shared_memory_bytes for kernel in compiled)


class AbsentDriver:
    """As much of a Triton driver as binding arguments and compiling asks for. A process compiles for a device once."""

    def __init__(self, capability: int, device: int | None = None) -> None:
        self.device = capability if device is None else device
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0


@contextlib.contextmanager
def launches_compiled_for(traits: GpuTraits, *, one_of_a_kind: bool = False) -> Iterator[list[Any]]:
    """Inside, a launch compiles its kernel and appends it to the yielded list. Nothing runs.

    With `one_of_a_kind` a kernel is compiled once for each setting of its switches, whatever its sizes are.
    """
    compiled: list[Any] = []
    kinds: set[tuple[str, frozenset[str]]] = set()
    run = JITFunction.run

    def compile_only(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kind = kernel.__name__, frozenset(name for name, value in options.items() if value is True)
        if one_of_a_kind and kind in kinds:
            return None
        kinds.add(kind)
        compiled.append(run(kernel, *args, grid=grid, warmup=True, **options))
        return compiled[-1]

    driver = triton.runtime.driver
    before = driver._active
    JITFunction.run = compile_only
    driver.set_active(AbsentDriver(_CAPABILITIES[traits]))
    try:
        yield compiled
    finally:
        JITFunction.run = run
        driver._active = before
