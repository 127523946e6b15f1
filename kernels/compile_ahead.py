"""Compiling kernels before they are launched, as many at a time as there are processors.

Triton compiles a kernel when it is first launched, for some tenths of a second, and the steps of a model launch about
forty kinds. Most of that time is LLVM's and ptxas's, neither of which holds the interpreter's lock.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from triton import AsyncCompileMode
from triton.runtime.jit import JITFunction

from triode.kernels.native.cpus import usable_threads

_MOST_THREADS = 32
_INT32_BITS = 31
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
    """What a kernel is compiled for: a number's value matters little, a tensor's not at all."""
    if isinstance(argument, int):
        return argument == 1, argument % 16 == 0, argument.bit_length() > _INT32_BITS
    return getattr(argument, "dtype", None) or type(argument)


# For good: another thread may be about to launch when one that compiles is done.
JITFunction.run = _run_or_compile


@contextmanager
def launches_only_compile() -> Iterator[None]:
    """Inside, and in this thread alone, a launch has its kernel compiled and launches nothing. Leaving waits for all.

    Raises:
        Exception: whatever a compiler does not like.
    """
    token = _compiled.set(set())
    try:
        with ThreadPoolExecutor(usable_threads(_MOST_THREADS)) as pool, AsyncCompileMode(pool):
            yield
    finally:
        _compiled.reset(token)
