"""The ranks of a model at run time: rank 0's program, which has the others compute each step with it, and theirs.

Each of the others says, over a socket to rank 0, that it is ready. Then rank 0 tells them what it computes: the arrays of a step, or how many rows of hidden states want
logits. Then all of them make the same call. Sums over ranks are added up within it (kernels/native/ranks.h), so that every
rank has the same hidden states, to the bit; logits of the other ranks come back by their memory (`rank_memory.py`).

    T packed tokens     R rows     D hidden     V vocab     P blocks     B block size     K KV heads     H head dim
"""

import socket
import threading
from collections import Counter
from collections.abc import Sequence
from typing import NoReturn, TypeAlias

import msgspec
import numpy as np
import numpy.typing as npt
import torch

from triode.cache.messages import BlockCopy
from triode.cache.pool import KVPool, free_memory_bytes
from triode.kernels.native.numa import bound_nodes
from triode.kernels.paged_attention.rows import AttentionRows
from triode.models.batch import StepBatch
from triode.models.config import ModelConfig
from triode.models.native import NativeDecoder, NativeKernels
from triode.models.rank_memory import MAX_LOGIT_ROWS, RankMemory

_LENGTH_BYTES = 8
_DONE = b"."


class UsePool(msgspec.Struct, frozen=True, tag=True):
    """Make room for so many blocks."""

    num_blocks: int
    block_size_tokens: int
    is_int8: bool


class CopyBlocks(msgspec.Struct, frozen=True, tag=True):
    """`KVPool.copy`."""

    copies: tuple[BlockCopy, ...]


class Forward(msgspec.Struct, frozen=True, tag=True):
    """Compute a step: the arrays of a `StepBatch`, as bytes of 64-bit integers."""

    token_ids: bytes
    positions: bytes
    slots: bytes
    query_start: bytes
    start: bytes
    block_table: bytes


class Logits(msgspec.Struct, frozen=True, tag=True):
    """Compute your part of the logits of so many rows of the hidden states in memory, and say when they are there."""

    num_rows: int


class Ready(msgspec.Struct, frozen=True):
    """A rank has its share of the weights."""

    free_bytes: int
    """What it could still take of the memory that is left."""
    nodes: tuple[int, ...]
    """Where that comes from; empty where from anywhere."""


Command: TypeAlias = UsePool | CopyBlocks | Forward | Logits
_decoder: msgspec.msgpack.Decoder[Command] = msgspec.msgpack.Decoder(Command)
_ready_decoder: msgspec.msgpack.Decoder[Ready] = msgspec.msgpack.Decoder(Ready)
_encoder = msgspec.msgpack.Encoder()


class LeadProgram:
    """The whole model as rank 0 computes it: a `StepProgram`."""

    def __init__(self, config: ModelConfig, own: NativeDecoder, memory: RankMemory) -> None:
        self.config = config
        self.device, self.dtype = own.device, own.dtype
        ranks = f"{memory.order.num_ranks} ranks"
        self.kernels = NativeKernels({name: f"{kernel}, {ranks}" for name, kernel in own.kernels.names.items()})
        self._own = own
        self._memory = memory
        self._links = [socket.socket(fileno=link) for link in memory.order.links]
        others = [self._hear_ready(link) for link in self._links]
        self.free_bytes = free_for_all([_ready(self.device), *others])
        """What all ranks together could still take, each as much as every other, when the last of them had its weights."""

    def _hear_ready(self, link: socket.socket) -> Ready:
        if not (body := _receive_message(link)):
            _await_the_end()
        return _ready_decoder.decode(body)

    def close(self) -> None:
        """Let the other ranks go."""
        for link in self._links:
            link.close()

    @property
    def matrices_bytes(self) -> int:
        """Of all ranks."""
        return self._own.matrices_bytes * self._memory.order.num_ranks

    @property
    def weights_bytes(self) -> int:
        """Of what all ranks keep of the weights."""
        return self._own.weights_bytes * self._memory.order.num_ranks

    def tell(self, command: Command) -> None:
        """Have all other ranks do it."""
        data = _message(command)
        for link in self._links:
            if not _sent(link, data):
                _await_the_end()

    def make_pool(self, num_blocks: int, block_size_tokens: int, dtype: torch.dtype) -> KVPool:
        """A pool for this rank's heads, and one of as many blocks in every other rank."""
        self.tell(UsePool(num_blocks, block_size_tokens, dtype == torch.int8))
        return LeadPool(self, self._own.config, num_blocks, block_size_tokens, dtype)

    def forward(
        self, batch: StepBatch, keys_PBKH: Sequence[torch.Tensor], values_PBKH: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        """Compute one step and store its keys and values; the hidden states after the final norm, [T, D]."""
        rows = batch.rows
        self.tell(
            Forward(
                token_ids=batch.token_ids_T.numpy().tobytes(),
                positions=batch.positions_PT.numpy().tobytes(),
                slots=batch.slot_T.numpy().tobytes(),
                query_start=rows.query_start_R1.tobytes(),
                start=rows.start_R.tobytes(),
                block_table=rows.block_table_RC.tobytes(),
            )
        )
        return self._own.forward(batch, keys_PBKH, values_PBKH)

    def logits(self, hidden_RD: torch.Tensor) -> torch.Tensor:
        """float32 logits [R, V] of the rows that need them."""
        return torch.cat([self._some_logits(some_RD) for some_RD in hidden_RD.split(MAX_LOGIT_ROWS)])

    def _some_logits(self, hidden_RD: torch.Tensor) -> torch.Tensor:
        num_rows, memory = len(hidden_RD), self._memory
        memory.hidden_RD[:num_rows] = hidden_RD
        self.tell(Logits(num_rows))
        parts = [self._own.logits(hidden_RD)]
        for rank, link in enumerate(self._links, 1):
            if _receive(link, len(_DONE)) != _DONE:
                _await_the_end()
            parts.append(memory.logits_RV[rank][:num_rows, : len(memory.parts[rank])])
        return torch.cat(parts, 1)


class LeadPool(KVPool):
    """Rank 0's keys and values. What is copied here is copied by all."""

    def __init__(
        self, lead: LeadProgram, share: ModelConfig, num_blocks: int, block_size_tokens: int, dtype: torch.dtype
    ) -> None:
        super().__init__(
            num_blocks,
            block_size_tokens=block_size_tokens,
            num_layers=share.num_layers,
            num_kv_heads=share.num_kv_heads,
            head_dim=share.head_dim,
            dtype=dtype,
            device=lead.device,
        )
        self._lead = lead

    def copy(self, copies: Sequence[BlockCopy]) -> None:
        """Copy whole blocks in all ranks."""
        if copies:
            self._lead.tell(CopyBlocks(tuple(copies)))
            super().copy(copies)


class FollowingRank:
    """Another rank's part: a `Follower`."""

    def __init__(self, own: NativeDecoder, memory: RankMemory) -> None:
        self._own = own
        self._memory = memory
        (link,) = memory.order.links
        self._link = socket.socket(fileno=link)
        # Where rank 0 is gone already, `obey` tells.
        _sent(self._link, _message(_ready(own.device)))

    def fileno(self) -> int:
        """Of the socket to rank 0."""
        return self._link.fileno()

    def close(self) -> None:
        """Leave rank 0."""
        self._link.close()

    @torch.inference_mode()
    def obey(self) -> bool:
        """Do what rank 0 says next; False if it has hung up."""
        if not (body := _receive_message(self._link)):
            return False
        match _decoder.decode(body):
            case UsePool(num_blocks, block_size_tokens, is_int8):
                dtype = torch.int8 if is_int8 else self._own.dtype
                self._pool = self._make_pool(num_blocks, block_size_tokens, dtype)
            case CopyBlocks(copies):
                self._pool.copy(copies)
            case Forward() as command:
                self._own.forward(self._batch(command), self._pool.keys, self._pool.values)
            case Logits(num_rows):
                memory, rank = self._memory, self._memory.order.rank
                logits_RV = self._own.logits(memory.hidden_RD[:num_rows])
                memory.logits_RV[rank][:num_rows, : logits_RV.shape[1]] = logits_RV
                return _sent(self._link, _DONE)
        return True

    def _make_pool(self, num_blocks: int, block_size_tokens: int, dtype: torch.dtype) -> KVPool:
        share = self._own.config
        return KVPool(
            num_blocks,
            block_size_tokens=block_size_tokens,
            num_layers=share.num_layers,
            num_kv_heads=share.num_kv_heads,
            head_dim=share.head_dim,
            dtype=dtype,
            device=self._own.device,
        )

    def _batch(self, command: Forward) -> StepBatch:
        def array(data: bytes) -> npt.NDArray[np.int64]:
            return np.frombuffer(bytearray(data), np.int64)

        start_R = array(command.start)
        rows = AttentionRows(
            array(command.query_start),
            start_R,
            array(command.block_table).reshape(len(start_R), -1),
            self._pool.block_size_tokens,
        )
        tokens, positions, slots = (
            torch.from_numpy(array(data)) for data in (command.token_ids, command.positions, command.slots)
        )
        return StepBatch(tokens, positions[None], slots, rows)


def free_for_all(ranks: Sequence[Ready]) -> int:
    """What ranks could still take together, each as much as every other: those that share memory divide it."""
    sharing = Counter(each.nodes for each in ranks)
    return min(each.free_bytes // sharing[each.nodes] for each in ranks) * len(ranks)


def _ready(device: torch.device) -> Ready:
    return Ready(free_memory_bytes(device), bound_nodes())


def _message(content: Command | Ready) -> bytes:
    body = _encoder.encode(content)
    return len(body).to_bytes(_LENGTH_BYTES, "big") + body


def _receive_message(link: socket.socket) -> bytes:
    """What `_message` has encoded; nothing if the other end is gone."""
    length = _receive(link, _LENGTH_BYTES)
    return _receive(link, int.from_bytes(length, "big")) if length else b""


def _receive(link: socket.socket, num_bytes: int) -> bytes:
    """So many bytes; none if the other end is gone."""
    data = bytearray()
    while len(data) < num_bytes:
        try:
            some = link.recv(num_bytes - len(data))
        except ConnectionError:
            return b""
        if not some:
            return b""
        data += some
    return bytes(data)


def _sent(link: socket.socket, data: bytes) -> bool:
    """Whether the other end was there to get it."""
    try:
        link.sendall(data)
    except ConnectionError:
        return False
    return True


def _await_the_end() -> NoReturn:
    """A rank is gone. The engine knows why, as it watches them all, and ends the others: nobody here can go on."""
    threading.Event().wait()
    raise AssertionError("nobody sets it")
