"""The ranks of a model at run time: rank 0's program, which has the others compute each step with it, and theirs.

Rank 0 tells the others, over a socket each (`rank_link.py`), what it computes: the arrays of a step, or how many rows of hidden
states want logits. Then all of them make the same call. Sums over ranks are added up within it (kernels/native/ranks.h), so
that every rank has the same hidden states, to the bit; logits of the other ranks come back by the memory that all share
(`rank_memory.py`).

    T packed tokens     R rows     W wanted tokens     D hidden     V vocab     P blocks     B block size     K KV heads
    H head dim
"""

import time
from collections.abc import Sequence
from typing import NoReturn

import numpy as np
import numpy.typing as npt
import torch

from triode.cache.messages import BlockCopy
from triode.cache.pool import KVPool, free_memory_bytes
from triode.kernels.native.numa import bound_nodes
from triode.kernels.paged_attention.rows import AttentionRows
from triode.kernels.sample.reference import greedy
from triode.models.batch import StepBatch
from triode.models.config import ModelConfig
from triode.models.native import NativeDecoder, NativeKernels
from triode.models.rank_link import (
    Command,
    CopyBlocks,
    Done,
    Forward,
    Logits,
    RankLink,
    Ready,
    UsePool,
    encode,
    free_together,
)
from triode.models.rank_memory import MAX_LOGIT_ROWS, RankMemory

_END_DEADLINE_S = 10.0
"""How long a rank that cannot go on leaves it to the engine to say why."""


class LeadProgram:
    """The whole model as rank 0 computes it: a `StepProgram`."""

    def __init__(self, config: ModelConfig, own: NativeDecoder, memory: RankMemory) -> None:
        self.config = config
        self.device, self.dtype = own.device, own.dtype
        ranks = f"{memory.order.num_ranks} ranks"
        self.kernels = NativeKernels({name: f"{kernel}, {ranks}" for name, kernel in own.kernels.names.items()})
        self._own = own
        self._memory = memory
        self._links = [RankLink(fd) for fd in memory.order.links]
        others = [self._hear_ready(link) for link in self._links]
        self.free_bytes = free_together([_ready(self.device), *others])
        """What all ranks together could still take, each as much as every other, when the last of them had its weights."""

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
        data = encode(command)
        for link in self._links:
            if not link.send(data):
                _await_the_end()

    def make_pool(self, num_blocks: int, block_size_tokens: int, dtype: torch.dtype) -> KVPool:
        """A pool for this rank's heads, and one of as many blocks in every other rank."""
        self.tell(UsePool(num_blocks, block_size_tokens, dtype == torch.int8))
        return LeadPool(self, self._own.config, num_blocks, block_size_tokens, dtype)

    def forward(
        self, batch: StepBatch, keys_PBKH: Sequence[torch.Tensor], values_PBKH: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        """Compute one step and store its keys and values; the hidden states after the final norm that the batch wants, [W, D]."""
        rows = batch.rows
        self.tell(
            Forward(
                token_ids=batch.token_ids_T.numpy().tobytes(),
                positions=batch.positions_PT.numpy().tobytes(),
                slots=batch.slot_T.numpy().tobytes(),
                query_start=rows.query_start_R1.tobytes(),
                start=rows.start_R.tobytes(),
                block_table=rows.block_table_RC.tobytes(),
                wanted_start=batch.wanted_start_R1.tobytes(),
            )
        )
        return self._own.forward(batch, keys_PBKH, values_PBKH)

    def logits(self, hidden_RD: torch.Tensor) -> torch.Tensor:
        """float32 logits [R, V] of the rows that need them."""
        return torch.cat([self._some_logits(some_RD) for some_RD in hidden_RD.split(MAX_LOGIT_ROWS)])

    def likeliest(self, hidden_RD: torch.Tensor) -> torch.Tensor:
        """The token with the largest logit of each row, [R]."""
        return greedy(self.logits(hidden_RD))

    def _hear_ready(self, link: RankLink) -> Ready:
        report = link.receive_report()
        return report if isinstance(report, Ready) else _await_the_end()

    def _some_logits(self, hidden_RD: torch.Tensor) -> torch.Tensor:
        num_rows, memory = len(hidden_RD), self._memory
        memory.hidden_RD[:num_rows] = hidden_RD
        self.tell(Logits(num_rows))
        parts = [self._own.logits(hidden_RD)]
        for rank, link in enumerate(self._links, 1):
            if link.receive_report() is None:
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
        (fd,) = memory.order.links
        self._link = RankLink(fd)
        # If rank 0 is gone already, `obey` tells.
        self._link.send(encode(_ready(own.device)))

    def fileno(self) -> int:
        """Of the socket to rank 0."""
        return self._link.fileno()

    def close(self) -> None:
        """Leave rank 0."""
        self._link.close()

    @torch.inference_mode()
    def obey(self) -> bool:
        """Do what rank 0 says next; False if it has hung up."""
        match self._link.receive_command():
            case None:
                return False
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
                return self._link.send(encode(Done()))
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
        return StepBatch(tokens, positions[None], slots, rows, array(command.wanted_start))


def _ready(device: torch.device) -> Ready:
    return Ready(free_memory_bytes(device), bound_nodes())


def _await_the_end() -> NoReturn:
    """A rank is gone. The engine knows why, as it watches them all, and ends the others: nobody here can go on."""
    time.sleep(_END_DEADLINE_S)
    raise RuntimeError(f"another rank is gone, and nobody has ended this one for {_END_DEADLINE_S} s")
