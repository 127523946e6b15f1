"""The GGUF container: metadata and quantised tensors in one memory-mapped file.

The `gguf` package knows the quantisation formats, but its reader makes a numpy array of every string and takes seconds
for a vocabulary. This one reads the same header in a few hundredths of a second, and trusts nothing that it reads: every
length is checked against the bytes that are left, so a truncated or corrupt file is refused before anything is allocated.

Layout (github.com/ggml-org/ggml/blob/master/docs/gguf.md), little-endian: magic, version, number of tensors, number of
metadata entries; the entries; one record a tensor; padding; the tensors' data.
"""

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from triode.errors import CorruptModel, UnsupportedModel

Scalar = str | int | float | bool
MetadataValue = Scalar | list[Scalar]

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MAX_DIMENSIONS = 4
_DEFAULT_ALIGNMENT = 32

_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """Where a tensor lies. `shape` is in torch's order: the last dimension is contiguous."""

    name: str
    shape: tuple[int, ...]
    quantization: str
    """A name of `gguf.GGMLQuantizationType`."""
    offset: int
    num_bytes: int


class GGUFFile:
    """One memory-mapped GGUF file.

    Raises:
        CorruptModel: the file is truncated or is not a GGUF file.
        UnsupportedModel: its version or a tensor's quantisation is unknown.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            if not file.read(1):
                raise CorruptModel(f"{path} is empty")
            # A private mapping is writable, as torch wants the memory of its tensors to be; nothing writes to it.
            self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        header = _HeaderReader(path, self._data)
        num_tensors, num_entries = header.counts()
        self.metadata: dict[str, MetadataValue] = {}
        for _ in range(num_entries):
            key = header.string()
            if key in self.metadata:
                raise CorruptModel(f"{path}: metadata key {key!r} occurs twice")
            self.metadata[key] = header.value(header.scalar("I"))
        self.tensors = _locate(header, num_tensors, self.metadata.get("general.alignment", _DEFAULT_ALIGNMENT))

    def rows(self, tensor: GGUFTensor, start: int, stop: int) -> npt.NDArray[np.uint8]:
        """The stored bytes of rows `start` to `stop`, [stop - start, bytes a row]; a view of the mapping."""
        num_rows = math.prod(tensor.shape[:-1])
        row_bytes = tensor.num_bytes // num_rows
        offset, count = tensor.offset + start * row_bytes, (stop - start) * row_bytes
        return np.frombuffer(self._data, np.uint8, count, offset).reshape(stop - start, row_bytes)


class _HeaderReader:
    """Reads the header front to back, never past its end."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path = path
        self.offset = 0
        self.size = len(data)
        self._data = data

    def counts(self) -> tuple[int, int]:
        """Checks magic and version; the numbers of tensors and of metadata entries."""
        if self._bytes(len(_MAGIC)) != _MAGIC:
            raise CorruptModel(f"{self.path} is not a GGUF file: it does not begin with {_MAGIC.decode()}")
        version = self.scalar("I")
        if version & 0xFFFF == 0:
            raise UnsupportedModel(f"{self.path} is a big-endian GGUF file")
        if version not in _VERSIONS:
            raise UnsupportedModel(f"{self.path} has GGUF version {version}; supported are 2 and 3")
        return self.scalar("Q"), self.scalar("Q")

    def scalar(self, code: str) -> int:
        """One integer in `struct`'s notation."""
        (value,) = struct.unpack(f"<{code}", self._bytes(struct.calcsize(f"<{code}")))
        return int(value)

    def integers(self, count: int) -> tuple[int, ...]:
        """`count` 64-bit integers."""
        return struct.unpack(f"<{count}Q", self._bytes(8 * count))

    def string(self) -> str:
        """A length and that many bytes of UTF-8."""
        raw = self._bytes(self.scalar("Q"))
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise CorruptModel(f"{self.path}: the header has a string that is not UTF-8: {raw[:40]!r}") from error

    def value(self, kind: int) -> MetadataValue:
        """A metadata value of type `kind`."""
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self._array()
        if kind not in _SCALARS:
            raise CorruptModel(f"{self.path}: the header has a value of unknown type {kind}")
        code = f"<{_SCALARS[kind]}"
        (value,) = struct.unpack(code, self._bytes(struct.calcsize(code)))
        scalar: Scalar = value
        return scalar

    def _array(self) -> list[Scalar]:
        kind, count = self.scalar("I"), self.scalar("Q")
        if kind == _STRING:
            return self._strings(count)
        if kind not in _SCALARS:
            raise CorruptModel(f"{self.path}: the header has an array of unknown type {kind}")
        code = _SCALARS[kind]
        # The size is checked before the format string with its count is built.
        raw = self._bytes(count * struct.calcsize(f"<{code}"))
        return list(struct.unpack(f"<{count}{code}", raw))

    def _strings(self, count: int) -> list[Scalar]:
        # A vocabulary has 10^5 strings: local names and no calls but the two of the struct and the slice.
        data, offset, size = self._data, self.offset, self.size
        length_of = struct.Struct("<Q").unpack_from
        strings: list[Scalar] = []
        try:
            for _ in range(count):
                (length,) = length_of(data, offset)
                offset += 8
                if length > size - offset:
                    raise self._truncated()
                strings.append(data[offset : offset + length].decode())
                offset += length
        except struct.error as error:
            raise self._truncated() from error
        except UnicodeDecodeError as error:
            raise CorruptModel(f"{self.path}: string {len(strings)} of an array is not UTF-8") from error
        self.offset = offset
        return strings

    def _bytes(self, count: int) -> bytes:
        if count > self.size - self.offset:
            raise self._truncated()
        start = self.offset
        self.offset += count
        return self._data[start : self.offset]

    def _truncated(self) -> CorruptModel:
        return CorruptModel(
            f"{self.path} is truncated: its header goes on past the end of the file at {self.size} bytes"
        )


def _locate(header: _HeaderReader, num_tensors: int, alignment: MetadataValue) -> dict[str, GGUFTensor]:
    """Reads the tensors' records, whose offsets count from the first aligned byte after the last record."""
    path = header.path
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise CorruptModel(f"{path}: general.alignment must be a power of two, got {alignment!r}")
    records = [_record(header) for _ in range(num_tensors)]
    start = -(-header.offset // alignment) * alignment
    tensors: dict[str, GGUFTensor] = {}
    for name, shape, quantization, offset in records:
        if name in tensors:
            raise CorruptModel(f"{path}: tensor {name} occurs twice")
        num_bytes = _num_bytes(path, name, shape, quantization)
        if start + offset + num_bytes > header.size:
            raise CorruptModel(
                f"{path} is truncated: tensor {name} ends at byte {start + offset + num_bytes} of {header.size}"
            )
        tensors[name] = GGUFTensor(name, shape, quantization.name, start + offset, num_bytes)
    return tensors


def _record(header: _HeaderReader) -> tuple[str, tuple[int, ...], GGMLQuantizationType, int]:
    name, num_dimensions = header.string(), header.scalar("I")
    if not 1 <= num_dimensions <= _MAX_DIMENSIONS:
        raise CorruptModel(f"{header.path}: tensor {name} has {num_dimensions} dimensions")
    shape = tuple(reversed(header.integers(num_dimensions)))
    kind, offset = header.scalar("I"), header.scalar("Q")
    try:
        return name, shape, GGMLQuantizationType(kind), offset
    except ValueError as error:
        raise UnsupportedModel(f"{header.path}: tensor {name} has the unknown quantisation type {kind}") from error


def _num_bytes(path: Path, name: str, shape: tuple[int, ...], quantization: GGMLQuantizationType) -> int:
    block_elements, block_bytes = GGML_QUANT_SIZES[quantization]
    if 0 in shape:
        raise CorruptModel(f"{path}: tensor {name} is empty: its shape is {list(shape)}")
    if shape[-1] % block_elements:
        raise CorruptModel(
            f"{path}: tensor {name} has rows of {shape[-1]} elements, which {quantization.name} cannot hold: "
            f"its blocks have {block_elements}"
        )
    return int(math.prod(shape) // block_elements * block_bytes)
