"""CUDA C++ to machine code by NVRTC, the compiler that torch's CUDA libraries bring along, and found again afterwards.

NVRTC takes up to a second for a kernel; what it made is kept in `$XDG_CACHE_HOME/triode/cuda`, by a digest of all that
determines it, so nothing stale is ever loaded, and behind its own digest, so nothing that was cut short is either. A cache
that cannot be read or written costs time alone. Functions and numbers are those of `nvrtc.h`.
"""

import ctypes
import functools
import logging
import os
import tempfile
from collections.abc import Mapping, Sequence
from ctypes import byref, c_char_p, c_int, c_size_t, c_void_p
from hashlib import sha256
from pathlib import Path

import torch

from triode.kernels.hopper_product.errors import ProductUnavailable
from triode.kernels.linear.cublaslt import loaded_library

_LOG = logging.getLogger("triode.kernels")
_COMPILATION = 6
"""`NVRTC_ERROR_COMPILATION`: the log says why."""
_MOST_SAID = 500
_DIGEST_BYTES = sha256().digest_size


class Nvrtc:
    """The library. Any number of threads may compile."""

    def __init__(self, path: str) -> None:
        """Load it.

        Raises:
            ProductUnavailable: it is not there, or lacks a function.
        """
        try:
            self._library = ctypes.CDLL(path)
            # By their bare name, NVRTC finds its own parts only where the system looks for libraries.
            for part in Path(path).parent.glob("libnvrtc-builtins.so*") if Path(path).is_absolute() else ():
                ctypes.CDLL(str(part))
            self._library.nvrtcGetErrorString.restype = c_char_p
            major, minor = c_int(), c_int()
            self._call("nvrtcVersion", byref(major), byref(minor))
        except (OSError, AttributeError) as error:
            raise ProductUnavailable(f"{path}: {error}") from error
        self.version = f"{major.value}.{minor.value}"

    def compile(self, source: str, headers: Mapping[str, str], options: Sequence[str]) -> tuple[bytes, str]:
        """The machine code of a source that includes nothing but these headers, by name; and what the compiler said.

        Raises:
            ProductUnavailable: it does not compile; with the compiler's first words.
        """
        program = c_void_p()
        names = (c_char_p * len(headers))(*(name.encode() for name in headers))
        texts = (c_char_p * len(headers))(*(text.encode() for text in headers.values()))
        told = (c_char_p * len(options))(*(option.encode() for option in options))
        self._call("nvrtcCreateProgram", byref(program), source.encode(), b"", len(headers), texts, names)
        try:
            status = self._library.nvrtcCompileProgram(program, len(options), told)
            log = self._read("ProgramLog", program).decode().strip()
            if status == _COMPILATION:
                raise ProductUnavailable(f"NVRTC {self.version}: {log[:_MOST_SAID]}")
            self._check("nvrtcCompileProgram", status)
            return self._read("CUBIN", program), log
        finally:
            self._library.nvrtcDestroyProgram(byref(program))

    def _read(self, what: str, program: c_void_p) -> bytes:
        size = c_size_t()
        self._call(f"nvrtcGet{what}Size", program, byref(size))
        text = ctypes.create_string_buffer(size.value)
        self._call(f"nvrtcGet{what}", program, text)
        # A log ends with a null byte; machine code has as many bytes as it says.
        return text.raw if what == "CUBIN" else text.value

    def _call(self, name: str, *arguments: object) -> None:
        self._check(name, getattr(self._library, name)(*arguments))

    def _check(self, name: str, status: int) -> None:
        if status:
            raise ProductUnavailable(f"{name}: {self._library.nvrtcGetErrorString(status).decode()}")


@functools.cache
def find_nvrtc() -> Nvrtc:
    """The one that torch has loaded, or that lies where its other libraries do.

    Raises:
        ProductUnavailable: there is none.
    """
    cuda = torch.version.cuda
    if cuda is None:
        raise ProductUnavailable("torch is built without CUDA")
    name = f"libnvrtc.so.{cuda.partition('.')[0]}"
    blas = loaded_library("libcublasLt.so")
    found = loaded_library(name) or (_beside(Path(blas), name) if blas else None)
    return Nvrtc(found or name)


def _beside(blas: Path, name: str) -> str | None:
    """CUDA 13's packages share a folder; those of CUDA 12, `nvidia/cublas/lib` and `nvidia/cuda_nvrtc/lib`, do not."""
    places = (blas.with_name(name), blas.parent.parent.parent / "cuda_nvrtc" / "lib" / name)
    return next((str(place) for place in places if place.exists()), None)


def describe_nvrtc() -> str:
    """Who compiles CUDA C++, or why nobody does."""
    try:
        return f"CUDA C++ by NVRTC {find_nvrtc().version}"
    except ProductUnavailable as error:
        return f"no CUDA C++, which needs NVRTC ({error}),"


def compiled(
    source: str, headers: Mapping[str, str], options: Sequence[str], *, name: str, nvrtc: Nvrtc | None = None
) -> bytes:
    """The machine code, compiled if it is not in the cache.

    Args:
        name: what the file's name begins with.
        nvrtc: a compiler other than torch's.

    Raises:
        ProductUnavailable: it cannot be compiled.
    """
    nvrtc = nvrtc or find_nvrtc()
    digest = sha256("\0".join((nvrtc.version, source, *headers, *headers.values(), *options)).encode()).hexdigest()[:16]
    file_name = f"{name}-{digest}.cubin"
    if code := _kept(file_name):
        return code
    code, _ = nvrtc.compile(source, headers, options)
    try:
        _keep(code, file_name)
    except OSError as error:
        _say_once(error.strerror or "cannot be written")
    except RuntimeError as error:
        _say_once(str(error))
    return code


def _folder() -> Path:
    """Raises RuntimeError where a user has no home."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "triode" / "cuda"


def _kept(file_name: str) -> bytes | None:
    """None, too, for a file that cannot be read, or is not what was written: the driver would read past its end."""
    try:
        kept = (_folder() / file_name).read_bytes()
    except (OSError, RuntimeError):
        return None
    digest, code = kept[:_DIGEST_BYTES], kept[_DIGEST_BYTES:]
    return code if sha256(code).digest() == digest else None


def _keep(code: bytes, file_name: str) -> None:
    """Written beside its final place and renamed, so that nobody finds half a file; nothing is left of what fails."""
    folder = _folder()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        written = Path(scratch) / file_name
        written.write_bytes(sha256(code).digest() + code)
        written.replace(folder / file_name)


@functools.cache
def _say_once(why: str) -> None:
    _LOG.warning(
        "compiled GPU kernels cannot be kept, and each start compiles them again (set XDG_CACHE_HOME): %s", why
    )
