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
_only_compiles: ContextVar[bool] = ContextVar("triode_only_compiles", default=False)
_run = JITFunction.run


def _run_or_compile(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
    return _run(kernel, *arguments, grid=grid, warmup=warmup or _only_compiles.get(), **options)


# For good: another thread may be about to launch when one that compiles is done.
JITFunction.run = _run_or_compile


@contextmanager
def launches_only_compile() -> Iterator[None]:
    """Inside, and in this thread alone, a launch has its kernel compiled and launches nothing. Leaving waits for all.

    Raises:
        Exception: whatever a compiler does not like.
    """
    token = _only_compiles.set(True)
    try:
        with ThreadPoolExecutor(usable_threads(_MOST_THREADS)) as pool, AsyncCompileMode(pool):
            yield
    finally:
        _only_compiles.reset(token)
