"""The compiled step, by ctypes: its structs, and one typed method for each of its functions.

ctypes releases the interpreter's lock during a call. The structs mirror `model.h` field by field; loading compares
their sizes. Steps have threads of their own (`team.h`); OpenMP's only pack weights, and torch must be imported before
the library is loaded, so that both use the same ones.
"""

import ctypes
import os
from collections.abc import Callable, Sequence
from ctypes import POINTER, Structure, byref, c_char_p, c_double, c_int32, c_int64, c_uint32, c_void_p, sizeof
from functools import cache
from pathlib import Path

from triode.kernels.native.build import NativeUnavailable, UnknownInstructions, WrongResults, build
from triode.kernels.native.formats import Packing
from triode.kernels.native.isa import InstructionSet, candidates, withheld


class MatrixStruct(Structure):
    """A packed matrix; addresses of memory that the caller keeps alive."""

    _fields_ = (
        ("panels", c_void_p),
        ("bias", c_void_p),
        ("scales", c_void_p),
        ("out_features", c_int64),
        ("in_features", c_int64),
        ("format", c_int64),
        ("group", c_int64),
        ("byte_inputs", c_int64),
    )


class LayerStruct(Structure):
    """One layer."""

    _fields_ = (
        ("input_norm", c_void_p),
        ("post_norm", c_void_p),
        ("q_norm", c_void_p),
        ("k_norm", c_void_p),
        ("qkv", MatrixStruct),
        ("o", MatrixStruct),
        ("gate_up", MatrixStruct),
        ("down", MatrixStruct),
        ("window_tokens", c_int64),
    )


class RanksStruct(Structure):
    """The processes that share a model, and their shared memory."""

    _fields_ = (
        ("rank", c_int64),
        ("num_ranks", c_int64),
        ("max_tokens", c_int64),
        ("arrivals", c_void_p),
        ("sums", c_void_p),
    )


class ModelStruct(Structure):
    """A decoder."""

    _fields_ = (
        ("is_bf16", c_int64),
        ("vocab_size", c_int64),
        ("hidden_size", c_int64),
        ("intermediate_size", c_int64),
        ("num_layers", c_int64),
        ("num_heads", c_int64),
        ("num_kv_heads", c_int64),
        ("head_dim", c_int64),
        ("num_positions", c_int64),
        ("norm_eps", c_double),
        ("embedding", MatrixStruct),
        ("final_norm", c_void_p),
        ("cos", c_void_p),
        ("sin", c_void_p),
        ("layers", POINTER(LayerStruct)),
        ("head", MatrixStruct),
        ("num_outputs", c_int64),
        ("ranks", POINTER(RanksStruct)),
    )


class BatchStruct(Structure):
    """The index arrays of a step and where its results go."""

    _fields_ = (
        ("num_tokens", c_int64),
        ("num_rows", c_int64),
        ("table_columns", c_int64),
        ("block_size_tokens", c_int64),
        ("num_blocks", c_int64),
        ("kv_is_int8", c_int64),
        ("token_ids", c_void_p),
        ("positions", c_void_p),
        ("slots", c_void_p),
        ("query_start", c_void_p),
        ("start", c_void_p),
        ("block_table", c_void_p),
        ("keys", c_void_p),
        ("values", c_void_p),
        ("wanted_start", c_void_p),
        ("hidden", c_void_p),
    )


class OrderStruct(Structure):
    """A step to be computed in its turn; addresses of memory that is left alone until it is done."""

    _fields_ = (
        ("model", POINTER(ModelStruct)),
        ("batch", BatchStruct),
        ("scratch", c_void_p),
        ("team", c_void_p),
        ("positions", c_void_p),
        ("start", c_void_p),
        ("slots", c_void_p),
        ("num_pending", c_int64),
        ("token_ids", c_void_p),
        ("pending", c_void_p),
        ("sources", c_void_p),
        ("previous_tokens", c_void_p),
        ("tokens", c_void_p),
        ("is_computed", c_void_p),
        ("seconds", c_void_p),
    )


STRUCTS = (MatrixStruct, LayerStruct, ModelStruct, BatchStruct, RanksStruct, OrderStruct)

_SIGNATURES: dict[str, tuple[type | None, tuple[object, ...]]] = {
    "triode_sizes": (None, (POINTER(c_int64),)),
    "triode_packed_bytes": (c_int64, (c_int32, c_int64, c_int32, c_int64, c_int64, c_int32)),
    "triode_prefer_huge_pages": (None, (c_void_p, c_int64)),
    "triode_pack": (None, (c_int32, c_void_p, c_int64, c_int64, c_int32, c_void_p)),
    "triode_pack_groups": (None, (c_int32, c_int64, c_int32, c_void_p, c_int64, c_int64, c_int32, c_void_p)),
    "triode_scratch_bytes": (c_int64, (POINTER(ModelStruct), c_int64, c_int32)),
    "triode_model_error": (c_char_p, (POINTER(ModelStruct),)),
    "triode_products_error": (c_char_p, ()),
    "triode_open_team": (c_void_p, (c_int32, POINTER(c_int32), POINTER(c_int32))),
    "triode_close_team": (None, (c_void_p,)),
    "triode_read": (c_uint32, (c_void_p, c_int64, c_void_p)),
    "triode_forward": (c_int32, (POINTER(ModelStruct), POINTER(BatchStruct), c_void_p, c_void_p)),
    "triode_logits": (None, (POINTER(ModelStruct), c_void_p, c_int64, c_void_p, c_void_p, c_void_p)),
    "triode_open_pipeline": (c_void_p, ()),
    "triode_close_pipeline": (None, (c_void_p,)),
    "triode_submit": (c_int64, (c_void_p, POINTER(OrderStruct))),
    "triode_wait": (c_int32, (c_void_p, c_int64, c_int64)),
    "triode_likeliest": (None, (POINTER(ModelStruct), c_void_p, c_int64, c_void_p, c_void_p, c_void_p)),
}


class NativeLibrary:
    """The functions of one build. Addresses are plain integers; nothing is kept after a call returns."""

    def __init__(self, path: str, isa: InstructionSet) -> None:
        self.isa = isa
        self.build = Path(path).stem
        """Names the instruction set, the sources and the compiler."""
        self.passed_over: tuple[str, ...] = ()
        """Why it is not a build for a better instruction set that the processor has."""
        self._library = ctypes.CDLL(path)
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(self._library, name)
            function.restype, function.argtypes = result, arguments
        sizes = (c_int64 * len(STRUCTS))()
        self._library.triode_sizes(sizes)
        mirrored = [sizeof(struct) for struct in STRUCTS]
        assert list(sizes) == mirrored, f"structs of {mirrored} bytes mirror structs of {list(sizes)} bytes"

    def packed_bytes(self, rows: int, columns: int, packing: Packing, *, number_bytes: int, halves: bool) -> int:
        """Bytes that a matrix [rows, columns] takes as panels.

        Args:
            rows: its rows.
            columns: its columns.
            packing: how it is kept.
            number_bytes: 4 for float32, 2 for bfloat16: of its numbers, if they are kept as they are.
            halves: whether the two halves of its rows are interleaved.
        """
        size = self._library.triode_packed_bytes(packing.format, packing.group, number_bytes, rows, columns, halves)
        return int(size)

    def pack(self, source: int, rows: int, columns: int, target: int, *, number_bytes: int, halves: bool) -> None:
        """Lay a contiguous matrix of numbers or of signed bytes out as panels."""
        self._library.triode_pack(number_bytes, source, rows, columns, halves, target)

    def pack_groups(
        self, source: int, rows: int, columns: int, target: int, packing: Packing, *, number_bytes: int, halves: bool
    ) -> None:
        """Round a contiguous matrix to a format with groups, or take a GGUF tensor's blocks, and lay it out as panels."""
        self._library.triode_pack_groups(
            packing.format, packing.group, number_bytes, source, rows, columns, halves, target
        )

    def prefer_huge_pages(self, address: int, num_bytes: int) -> None:
        """Ask the system for huge pages, before anything is written there."""
        self._library.triode_prefer_huge_pages(address, num_bytes)

    def scratch_bytes(self, model: ModelStruct, num_tokens: int, num_threads: int) -> int:
        """Bytes of working memory, aligned to 64, that a step of `num_tokens` or so many rows of logits need."""
        return int(self._library.triode_scratch_bytes(byref(model), num_tokens, num_threads))

    def check(self, model: ModelStruct) -> None:
        """Once, before the first step.

        Raises:
            ValueError: the model's table of layers contradicts itself.
        """
        if error := self._library.triode_model_error(byref(model)):
            raise ValueError(f"the table of layers must fit the model's sizes, but {error.decode()}")

    def check_products(self) -> None:
        """Once, before anything relies on this build.

        Raises:
            WrongResults: its products are wrong on this processor, or depend on how many rows there are.
        """
        if error := self._library.triode_products_error():
            raise WrongResults(f"the CPU kernels for {self.isa.name} compute wrongly here: {error.decode()}")

    def open_team(self, num_helpers: int, cpus: Sequence[int] | None) -> int:
        """Start threads that help whoever calls `forward` and `logits` with their handle; each stays on its CPU.

        Raises:
            OSError: the system starts no more; none is left.
        """
        places = None if cpus is None else (c_int32 * num_helpers)(*cpus)
        error = c_int32()
        team = self._library.triode_open_team(num_helpers, places, byref(error))
        if team is None:
            reason = f"the system does not start {num_helpers} threads, lower num_threads or raise its limits"
            raise OSError(error.value, f"{reason}: {os.strerror(error.value)}")
        return int(team)

    def close_team(self, team: int) -> None:
        """End them."""
        self._library.triode_close_team(team)

    def read(self, address: int, num_bytes: int, team: int) -> None:
        """Read whole MiB of memory once, to be timed."""
        self._library.triode_read(address, num_bytes, team)

    def forward(self, model: ModelStruct, batch: BatchStruct, scratch: int, team: int) -> None:
        """Compute a step.

        Raises:
            ValueError: an index of the batch is out of bounds; nothing was computed.
        """
        if not self._library.triode_forward(byref(model), byref(batch), scratch, team):
            raise ValueError("batch must hold tokens, positions, slots and blocks that exist, got one that does not")

    def logits(self, model: ModelStruct, hidden: int, rows: int, out: int, scratch: int, team: int) -> None:
        """The head over contiguous hidden states; `out` is [rows, outputs of the head rounded up to 64] floats."""
        self._library.triode_logits(byref(model), hidden, rows, out, scratch, team)

    def likeliest(self, model: ModelStruct, hidden: int, rows: int, tokens: int, scratch: int, team: int) -> None:
        """The token of the largest logit of each row, the lowest id among equals, to `tokens`, [rows] of int64; -1 where a
        logit is NaN or the largest one is not finite."""
        self._library.triode_likeliest(byref(model), hidden, rows, tokens, scratch, team)

    def open_pipeline(self) -> int:
        """Start a thread that computes steps one after the other.

        Raises:
            OSError: the system starts no more threads.
        """
        pipeline = self._library.triode_open_pipeline()
        if pipeline is None:
            raise OSError("the system does not start one more thread, raise its limits")
        return int(pipeline)

    def close_pipeline(self, pipeline: int) -> None:
        """Compute what has been ordered, and end the thread."""
        self._library.triode_close_pipeline(pipeline)

    def submit(self, pipeline: int, order: OrderStruct) -> int:
        """Order a step. Returns its number."""
        return int(self._library.triode_submit(pipeline, byref(order)))

    def wait(self, pipeline: int, number: int, wait_s: float | None) -> bool:
        """Whether an order is done, after waiting for at most `wait_s`; None is for ever."""
        microseconds = -1 if wait_s is None else int(wait_s * 1e6)
        return bool(self._library.triode_wait(pipeline, number, microseconds))


def load_library(announce: Callable[[str], None]) -> NativeLibrary:
    """The library for the best instruction set that the compiler knows and that computes rightly, compiled if need be.

    Raises:
        NativeUnavailable: it cannot be had here (`build.build`).
        ValueError: the environment asks for an instruction set that this processor lacks.
    """
    reasons: list[NativeUnavailable] = []
    for isa in candidates():
        try:
            library = _open(str(build(isa, announce)), isa)
        except (UnknownInstructions, WrongResults) as reason:
            reasons.append(reason)
        else:
            library.passed_over = (*withheld(), *map(str, reasons))
            return library
    raise reasons[0]


@cache
def _open(path: str, isa: InstructionSet) -> NativeLibrary:
    try:
        library = NativeLibrary(path, isa)
    except OSError as error:
        raise NativeUnavailable(f"the compiled CPU kernels do not load: {error}") from error
    library.check_products()
    return library
