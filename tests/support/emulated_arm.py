"""The compiled step for ARM's processors, run by QEMU: a `NativeLibrary` whose every call crosses to another machine.

A call carries all the memory that it may read, at places of its own there, and brings back what it may have written. The
working memory stays there, with whatever earlier calls have left in it.
"""

import atexit
import ctypes
import os
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from mmap import mmap
from pathlib import Path

import pytest

from triode.kernels.native.build import build
from triode.kernels.native.formats import CHANNEL8, GGUF_Q4_0, GGUF_Q4_1, GGUF_Q8_0, PLAIN, Packing
from triode.kernels.native.isa import INSTRUCTION_SETS
from triode.kernels.native.library import STRUCTS, BatchStruct, LayerStruct, MatrixStruct, ModelStruct, NativeLibrary

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
SYSROOT = "/usr/aarch64-linux-gnu"
DRIVER = Path(__file__).with_name("remote_step.cpp")
PROCESSORS = {
    "neon": "cortex-a53",
    "neon_dotprod": "neoverse-n1",
    "neon_i8mm": "max",
    "neon_bf16": "max",
    "sve256_bf16": "max,sve-max-vq=2",
    "sve512": "a64fx",
}
"""What QEMU pretends to be: where it knows one, a processor that has no more than the instruction set."""

_ROOM_BYTES = _SCRATCH_BYTES = 2**26
_ALIGNMENT_BYTES = 64
_PANEL = 64
_GGUF_BYTES = {GGUF_Q8_0: 34, GGUF_Q4_0: 18, GGUF_Q4_1: 20}
"""Of a block of 32 weights."""


def _rounded_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


class Machine:
    """A process that runs a build of the step under the emulator, and memory that it shares with this one."""

    def __init__(self, isa: str) -> None:
        library = _built(isa)
        self.build = library.stem
        handle, room = tempfile.mkstemp(prefix="triode-emulated-")
        os.truncate(handle, _ROOM_BYTES + _SCRATCH_BYTES)
        self._room = mmap(handle, _ROOM_BYTES + _SCRATCH_BYTES)
        os.close(handle)
        self._here = ctypes.addressof(ctypes.c_char.from_buffer(self._room))
        driver = f"{room}-driver"
        subprocess.run([COMPILER, "-std=c++17", "-O1", str(DRIVER), "-o", driver, "-ldl"], check=True)
        self._process = subprocess.Popen(
            [EMULATOR, "-L", SYSROOT, "-cpu", PROCESSORS[isa], driver, str(library), room, str(len(self._room))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        atexit.register(self._process.communicate)
        self._there = self._number()
        Path(room).unlink()
        Path(driver).unlink()
        # Whatever is left in working memory must not be mistaken for numbers.
        self._room[_ROOM_BYTES:] = b"\xff" * _SCRATCH_BYTES

    @property
    def scratch(self) -> int:
        """Where its working memory is, in its own addresses."""
        return self._there + _ROOM_BYTES

    def call(self, name: str, *arguments: int) -> int:
        """The result of a function."""
        padded = [*arguments, *[0] * (8 - len(arguments))]
        assert self._process.stdin is not None, "it has a pipe"
        self._process.stdin.write(struct.pack("9q", *padded, len(name)) + name.encode())
        self._process.stdin.flush()
        return self._number()

    def copy_in(self, offset: int, source: int, num_bytes: int) -> int:
        """Copy local memory into the room; its address there."""
        assert offset + num_bytes <= _ROOM_BYTES, "the emulated machine has room for a call"
        ctypes.memmove(self._here + offset, source, num_bytes)
        return self._there + offset

    def copy_out(self, offset: int, target: int, num_bytes: int) -> None:
        """Copy from the room to local memory."""
        ctypes.memmove(target, self._here + offset, num_bytes)

    def _number(self) -> int:
        assert self._process.stdout is not None, "it has a pipe"
        data = self._process.stdout.read(8)
        assert len(data) == 8, f"the emulated step has ended with {self._process.wait()}"
        number: int = struct.unpack("q", data)[0]
        return number


def _built(isa: str) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CXX", COMPILER)
        return build(INSTRUCTION_SETS[isa], lambda _: None)


class Image:
    """The memory of one call as it lies in the room, and what of it comes back."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._used = 0
        self._returning: list[tuple[int, int, int]] = []

    def place(self, source: int | None, num_bytes: int) -> int | None:
        """Copy local memory, if there is any; its address there."""
        if source is None:
            return None
        start, self._used = self._used, _rounded_up(self._used + num_bytes, _ALIGNMENT_BYTES)
        return self._machine.copy_in(start, source, num_bytes)

    def put(self, data: bytes) -> int:
        """The same of bytes."""
        buffer = ctypes.create_string_buffer(data, len(data))
        address = self.place(ctypes.addressof(buffer), len(data))
        assert address is not None, "there is something"
        return address

    def place_back(self, source: int, num_bytes: int) -> int:
        """The same, and what is there after the call comes back to `source`."""
        self._returning.append((self._used, source, num_bytes))
        address = self.place(source, num_bytes)
        assert address is not None, "there is something"
        return address

    def fetch(self) -> None:
        """Copy back what comes back."""
        for offset, source, num_bytes in self._returning:
            self._machine.copy_out(offset, source, num_bytes)


class EmulatedLibrary(NativeLibrary):
    """Everything that a decoder asks of the library, done by a `Machine`."""

    def __init__(self, isa: str) -> None:
        self.isa = INSTRUCTION_SETS[isa]
        self._machine = Machine(isa)
        self.build = self._machine.build
        self._sizes: dict[tuple[int, ...], int] = {}
        sizes = (ctypes.c_int64 * len(STRUCTS))()
        image = Image(self._machine)
        self._machine.call("triode_sizes", image.place_back(ctypes.addressof(sizes), ctypes.sizeof(sizes)))
        image.fetch()
        mirrored = [ctypes.sizeof(kind) for kind in STRUCTS]
        assert list(sizes) == mirrored, "structs are the same there"

    def packed_bytes(self, rows: int, columns: int, packing: Packing, *, number_bytes: int, halves: bool) -> int:
        arguments = (packing.format, packing.group, number_bytes, rows, columns, int(halves))
        if arguments not in self._sizes:
            self._sizes[arguments] = self._machine.call("triode_packed_bytes", *arguments)
        return self._sizes[arguments]

    def pack(self, source: int, rows: int, columns: int, target: int, *, number_bytes: int, halves: bool) -> None:
        packing = Packing(CHANNEL8 if number_bytes == 1 else PLAIN)
        num_bytes = self.packed_bytes(rows, columns, packing, number_bytes=number_bytes, halves=halves)
        image = Image(self._machine)
        from_there = image.place(source, rows * columns * number_bytes)
        to = image.place_back(target, num_bytes)
        assert from_there is not None
        self._machine.call("triode_pack", number_bytes, from_there, rows, columns, int(halves), to)
        image.fetch()

    def pack_groups(
        self, source: int, rows: int, columns: int, target: int, packing: Packing, *, number_bytes: int, halves: bool
    ) -> None:
        block_bytes = _GGUF_BYTES.get(packing.format)
        row_bytes = columns * number_bytes if block_bytes is None else columns // packing.group * block_bytes
        num_bytes = self.packed_bytes(rows, columns, packing, number_bytes=number_bytes, halves=halves)
        image = Image(self._machine)
        from_there = image.place(source, rows * row_bytes)
        to = image.place_back(target, num_bytes)
        assert from_there is not None
        place = (from_there, rows, columns, int(halves), to)
        self._machine.call("triode_pack_groups", packing.format, packing.group, number_bytes, *place)
        image.fetch()

    def prefer_huge_pages(self, address: int, num_bytes: int) -> None:
        """Local memory needs none."""

    def scratch_bytes(self, model: ModelStruct, num_tokens: int, num_threads: int) -> int:
        model_there = Image(self._machine).put(bytes(model))
        num_bytes = self._machine.call("triode_scratch_bytes", model_there, num_tokens, num_threads)
        assert num_bytes <= _SCRATCH_BYTES, "the emulated machine has room for a step"
        return num_bytes

    def check(self, model: ModelStruct) -> None:
        image = Image(self._machine)
        copy = ModelStruct.from_buffer_copy(model)
        if model.layers:
            # Models of tests have two layers. A table that promises more ends in zeros.
            table = ctypes.string_at(model.layers, ctypes.sizeof(LayerStruct) * 2) + bytes(2**16)
            _set(copy, "layers", image.put(table))
        address = image.put(bytes(copy))
        if error := self._machine.call("triode_model_error", address):
            text = ctypes.create_string_buffer(200)
            self._machine.call("strncpy", image.place_back(ctypes.addressof(text), len(text)), error, len(text) - 1)
            image.fetch()
            raise ValueError(f"the table of layers must fit the model's sizes, but {text.value.decode()}")

    def open_team(self, num_helpers: int, cpus: Sequence[int] | None) -> int:
        return self._machine.call("triode_open_team", num_helpers, 0)

    def close_team(self, team: int) -> None:
        self._machine.call("triode_close_team", team)

    def forward(self, model: ModelStruct, batch: BatchStruct, scratch: int, team: int) -> None:
        image = Image(self._machine)
        model_there = self._place_model(image, model)
        T, R = batch.num_tokens, batch.num_rows
        copy = BatchStruct.from_buffer_copy(batch)
        columns = R * batch.table_columns
        ends = (("query_start", R + 1), ("wanted_start", R + 1))
        for name, count in (("token_ids", T), ("positions", T), ("slots", T), ("start", R), *ends):
            setattr(copy, name, image.place(getattr(batch, name), 8 * count))
        copy.block_table = image.place(batch.block_table, 8 * columns)
        number_bytes = 2 if model.is_bf16 else 4
        num_wanted = ctypes.c_int64.from_address(batch.wanted_start + 8 * R).value
        # A table that wants more than there is has no more room than that, and is refused.
        if hidden_bytes := min(max(num_wanted, 0), T) * model.hidden_size * number_bytes:
            copy.hidden = image.place_back(batch.hidden, hidden_bytes)
        head_bytes = _rounded_up(model.head_dim, 4) + 4 if batch.kv_is_int8 else model.head_dim * number_bytes
        pool_bytes = batch.num_blocks * batch.block_size_tokens * model.num_kv_heads * head_bytes
        for name in ("keys", "values"):
            pools = (ctypes.c_void_p * model.num_layers).from_address(getattr(batch, name))
            there = [image.place_back(pool or 0, pool_bytes) for pool in pools]
            setattr(copy, name, image.put(struct.pack(f"{len(there)}q", *there)))
        batch_there = image.put(bytes(copy))
        # Only the lower half of the answer is an int32's.
        done = self._machine.call("triode_forward", model_there, batch_there, self._machine.scratch, team) & 0xFFFFFFFF
        image.fetch()
        if not done:
            raise ValueError("batch must hold tokens, positions, slots and blocks that exist, got one that does not")

    def logits(self, model: ModelStruct, hidden: int, rows: int, out: int, scratch: int, team: int) -> None:
        image = Image(self._machine)
        model_there = self._place_model(image, model)
        from_there = image.place(hidden, rows * model.hidden_size * (2 if model.is_bf16 else 4))
        to = image.place_back(out, rows * _rounded_up(model.num_outputs, _PANEL) * 4)
        assert from_there is not None
        self._machine.call("triode_logits", model_there, from_there, rows, to, self._machine.scratch, team)
        image.fetch()

    def likeliest(self, model: ModelStruct, hidden: int, rows: int, tokens: int, scratch: int, team: int) -> None:
        image = Image(self._machine)
        model_there = self._place_model(image, model)
        from_there = image.place(hidden, rows * model.hidden_size * (2 if model.is_bf16 else 4))
        to = image.place_back(tokens, rows * 8)
        assert from_there is not None
        self._machine.call("triode_likeliest", model_there, from_there, rows, to, self._machine.scratch, team)
        image.fetch()

    def _place_model(self, image: Image, model: ModelStruct) -> int:
        copy = ModelStruct.from_buffer_copy(model)
        angles = model.num_positions * model.head_dim // 2 * 4
        sizes = {"final_norm": _floats(model.hidden_size), "cos": angles, "sin": angles}
        for name, num_bytes in sizes.items():
            setattr(copy, name, image.place(getattr(model, name), num_bytes))
        copy.embedding = self._place_matrix(image, model, model.embedding)
        copy.head = self._place_matrix(image, model, model.head)
        layers = [bytes(self._place_layer(image, model, model.layers[i])) for i in range(model.num_layers)]
        _set(copy, "layers", image.put(b"".join(layers)))
        return image.put(bytes(copy))

    def _place_layer(self, image: Image, model: ModelStruct, layer: LayerStruct) -> LayerStruct:
        copy = LayerStruct.from_buffer_copy(layer)
        hidden, head = _floats(model.hidden_size), _floats(model.head_dim)
        for name, num_bytes in (("input_norm", hidden), ("post_norm", hidden), ("q_norm", head), ("k_norm", head)):
            setattr(copy, name, image.place(getattr(layer, name), num_bytes))
        for name in ("qkv", "o", "gate_up", "down"):
            setattr(copy, name, self._place_matrix(image, model, getattr(layer, name), halves=name == "gate_up"))
        return copy

    def _place_matrix(
        self, image: Image, model: ModelStruct, matrix: MatrixStruct, *, halves: bool = False
    ) -> MatrixStruct:
        copy = MatrixStruct.from_buffer_copy(matrix)
        rows = matrix.out_features
        packing = Packing(matrix.format, matrix.group)
        number_bytes = 2 if model.is_bf16 else 4
        num_bytes = self.packed_bytes(rows, matrix.in_features, packing, number_bytes=number_bytes, halves=halves)
        outputs = _floats(_rounded_up(rows // 2, 16) * 2 if halves else rows)
        copy.panels = image.place(matrix.panels, num_bytes)
        copy.bias = image.place(matrix.bias, outputs)
        copy.scales = image.place(matrix.scales, outputs)
        return copy


def _floats(count: int) -> int:
    """Bytes of so many, padded as vectors beside a matrix are."""
    return _rounded_up(count, _PANEL) * 4


def _set(model: ModelStruct, field: str, address: int) -> None:
    """An address of the other machine in place of a typed pointer."""
    offset = getattr(ModelStruct, field).offset
    ctypes.c_int64.from_buffer(model, offset).value = address


@cache
def emulated(isa: str) -> EmulatedLibrary:
    """The library for one of `PROCESSORS`, started once."""
    return EmulatedLibrary(isa)
