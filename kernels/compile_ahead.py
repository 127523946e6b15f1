"""Compiling and loading kernels before they are launched, as many at a time as there are processors.

Triton compiles a kernel when it is first launched, for some tenths of a second, and the steps of a model launch about
forty kinds. Most of that time is LLVM's and ptxas's, neither of which holds the interpreter's lock. Then it loads the
kernel, and up to Triton 3.6 has a C compiler make a launcher for its types, which takes as long again.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from triton import AsyncCompileMode
from triton.runtime.jit import JITFunction

from triode.kernels.native.cpus import usable_threads

_MOST_THREADS = 32
_INT32_BITS = 31
_ALIGNED_BYTES = 16
_compiled: ContextVar[set[object] | None] = ContextVar("triode_compiled", default=None)
"""What has been compiled where launches only compile; None where they launch."""
_run = JITFunction.run


def _run_or_compile(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
    compiled = _compiled.get()
    if compiled is None:
        return _run(kernel, *arguments, grid=grid, warmup=warmup, **options)
    # Triton would find this out, too, but 20 ms later.
    launch = kernel, tuple(map(_kind, arguments)), tuple((name, repr(value)) for name, value in options.items())
    if launch in compiled:
        return None
    compiled.add(launch)
    return _run(kernel, *arguments, grid=grid, warmup=True, **options)


def _kind(argument: object) -> object:
    """What a kernel is compiled for: a number's value matters little, and of a tensor where it begins."""
    if isinstance(argument, int):
        return argument == 1, argument % 16 == 0, argument.bit_length() > _INT32_BITS
    if isinstance(argument, torch.Tensor):
        return argument.dtype, argument.data_ptr() % _ALIGNED_BYTES == 0
    return type(argument)


# For good: another thread may be about to launch when one that compiles is done.
JITFunction.run = _run_or_compile


class _Loading(ThreadPoolExecutor):
    """Its threads load what they have compiled."""

    def submit(self, compile_one: Callable[..., Any], /, *arguments: Any, **options: Any) -> Future[Any]:
        """Compile and load a kernel."""

        def loaded() -> Any:
            kernel = compile_one(*arguments, **options)
            # What a launch would ask for; Triton loads a kernel when it is asked how it is run.
            _ = kernel.run
            return kernel

        return super().submit(loaded)


@contextmanager
def launches_only_compile(device: torch.device | None = None) -> Iterator[None]:
    """Inside, and in this thread alone, a launch has its kernel compiled and launches nothing. Leaving waits for all.

    Args:
        device: where the kernels are loaded, too; None loads none.

    Raises:
        Exception: whatever a compiler does not like.
    """
    token = _compiled.set(set())
    try:
        with ExitStack() as inside:
            num_threads = usable_threads(_MOST_THREADS)
            threads = ThreadPoolExecutor(num_threads)
            if device is not None:
                inside.enter_context(torch.cuda.device(device))
                # Which device is the current one each thread has to be told.
                here = torch.cuda.current_device()
                threads = _Loading(num_threads, initializer=torch.cuda.set_device, initargs=(here,))
            inside.enter_context(threads)
            inside.enter_context(AsyncCompileMode(threads))
            yield
    finally:
        _compiled.reset(token)
