"""What the ranks of a model say to each other, and the socket that it goes over.

    rank 0 → another     UsePool, then CopyBlocks, Forward and Logits as the batch wants them
    another → rank 0     Ready once it has its share of the weights, then Done for every Logits

A message is msgpack behind its length. Either end may die at any time, which the other one takes for a hangup.
"""

import socket
from collections import Counter
from collections.abc import Sequence
from typing import TypeAlias

import msgspec

from triode.cache.messages import BlockCopy

_LENGTH_BYTES = 8


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
    wanted_start: bytes


class Logits(msgspec.Struct, frozen=True, tag=True):
    """Compute your part of the logits of so many rows of the hidden states in `RankMemory`, and say when they are there."""

    num_rows: int


class Ready(msgspec.Struct, frozen=True, tag=True):
    """A rank has its share of the weights."""

    free_bytes: int
    """What it could still take of the memory that is left."""
    nodes: tuple[int, ...]
    """Where that comes from; empty where from anywhere."""


class Done(msgspec.Struct, frozen=True, tag=True):
    """The logits are in `RankMemory`."""


Command: TypeAlias = UsePool | CopyBlocks | Forward | Logits
Report: TypeAlias = Ready | Done


class RankLink:
    """One end of the socket between rank 0 and another."""

    def __init__(self, fd: int) -> None:
        """Takes the file descriptor over."""
        self._socket = socket.socket(fileno=fd)

    def fileno(self) -> int:
        """The socket's number."""
        return self._socket.fileno()

    def close(self) -> None:
        """Hang up."""
        self._socket.close()

    def send(self, data: bytes) -> bool:
        """Send what `encode` has made. Returns whether the other end was there to get it."""
        try:
            self._socket.sendall(data)
        except ConnectionError:
            return False
        return True

    def receive_command(self) -> Command | None:
        """What rank 0 says next; None if it has hung up."""
        body = self._receive_message()
        return _commands.decode(body) if body else None

    def receive_report(self) -> Report | None:
        """What the other rank says next; None if it has hung up."""
        body = self._receive_message()
        return _reports.decode(body) if body else None

    def _receive_message(self) -> bytes:
        length = self._receive(_LENGTH_BYTES)
        return self._receive(int.from_bytes(length, "big")) if length else b""

    def _receive(self, num_bytes: int) -> bytes:
        """So many bytes; none if the other end is gone."""
        data = bytearray()
        while len(data) < num_bytes:
            try:
                some = self._socket.recv(num_bytes - len(data))
            except ConnectionError:
                return b""
            if not some:
                return b""
            data += some
        return bytes(data)


_commands: msgspec.msgpack.Decoder[Command] = msgspec.msgpack.Decoder(Command)
_reports: msgspec.msgpack.Decoder[Report] = msgspec.msgpack.Decoder(Report)
_encoder = msgspec.msgpack.Encoder()


def encode(message: Command | Report) -> bytes:
    """The message as it goes over the socket."""
    body = _encoder.encode(message)
    return len(body).to_bytes(_LENGTH_BYTES, "big") + body


def free_together(ranks: Sequence[Ready]) -> int:
    """Bytes that ranks could still take together, each as many as every other: those that share memory divide it."""
    sharing = Counter(each.nodes for each in ranks)
    return min(each.free_bytes // sharing[each.nodes] for each in ranks) * len(ranks)
