"""The work of a step on the device: decode steps from the arena alone, others from arrays that the host packed.

T packed query tokens    R rows    Q rows that sample    D hidden    V vocabulary    X blocks of the longest table
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from triode.cache.messages import BlockCopy
from triode.cache.pool import KVPool
from triode.kernels.paged_attention.gpu import SEGMENT_TOKENS
from triode.kernels.sample.gpu import SampleWorkspace, sample
from triode.kernels.step.gpu import begin_decode, embed, gather_tables
from triode.models.cuda.arena import Arena, Changes
from triode.models.cuda.batch import PackedRows
from triode.models.cuda.decoder import CudaDecoder, RowGroup, TokenPlaces
from triode.models.cuda.gpu import Gpu
from triode.models.cuda.programs import Programs, bucket_for, segment_bucket_for


class PackedArrays:
    """`PackedRows.words` on the device, cut into its arrays."""

    def __init__(self, packed: PackedRows, gpu: Gpu) -> None:
        words = gpu.upload(packed.words)
        num_tokens, num_rows, num_sampled = packed.num_tokens, packed.num_rows, len(packed.sampled)
        sizes = [num_tokens] * 3 + [num_rows + 1] + [num_rows] * 3 + [num_sampled] * 3
        bounds = pairwise([0, *np.cumsum(sizes).tolist()])
        parts = [words[first:last] for first, last in bounds]
        self.token_T, self.position_T, self.kv_slot_T, self.query_start_R1, self.start_R, self.end_R = parts[:6]
        self.slot_R, self.sample_token_Q, self.sample_end_Q, self.sample_slot_Q = parts[6:]


@dataclass(frozen=True, slots=True)
class _StepTensors:
    """What the kernels of one step hand to the next."""

    position_R: torch.Tensor
    kv_slot_R: torch.Tensor
    end_R: torch.Tensor
    query_start_R1: torch.Tensor
    """0, 1, 2, ..."""
    table_RX: torch.Tensor
    token_R: torch.Tensor

    @classmethod
    def allocate(cls, num_rows: int, num_entries: int, device: torch.device) -> "_StepTensors":
        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        return cls(
            position_R=zeros(num_rows),
            kv_slot_R=zeros(num_rows),
            end_R=zeros(num_rows),
            query_start_R1=torch.arange(num_rows + 1, dtype=torch.int32, device=device),
            table_RX=zeros(num_rows, num_entries),
            token_R=zeros(num_rows),
        )


class DeviceSteps:
    """Steps over one decoder, pool and arena. Belongs in `Gpu.active()`."""

    def __init__(self, decoder: CudaDecoder, pool: KVPool, arena: Arena, gpu: Gpu) -> None:
        self.decoder = decoder
        self._pool = pool
        self._arena = arena
        self._gpu = gpu
        layout = arena.layout
        self._tensors = _StepTensors.allocate(layout.num_rows, layout.num_entries, gpu.device)
        self._workspace = SampleWorkspace.allocate(layout.num_rows, decoder.config.vocab_size, gpu.device)
        self._forward = Programs(self._compute_decode, gpu)
        self._sample = Programs(self._sample_decode, gpu)

    @property
    def num_graphs(self) -> int:
        """How many pieces of work have been captured."""
        return self._forward.num_captured + self._sample.num_captured

    def prepare(self, changes: Changes, copies: Sequence[BlockCopy]) -> None:
        """Bring the arena up to date, then copy blocks."""
        self._arena.apply(changes)
        if copies:
            pairs = np.array([[copy.source for copy in copies], [copy.target for copy in copies]], np.int32)
            sources, targets = self._gpu.upload(pairs).long()
            self._pool.copy_blocks(sources, targets)

    def decode(self, num_rows: int, longest: int) -> torch.Tensor:
        """Logits of the arena's first rows, which have at most `longest` tokens."""
        bucket = bucket_for(num_rows)
        segments = segment_bucket_for(-(-longest // SEGMENT_TOKENS))
        self._forward.run(bucket, self.decoder.splits(bucket, segments))
        return self.decoder.buffers.logits_RV[:num_rows]

    def sample_decode(self, num_rows: int) -> torch.Tensor:
        """Choose their tokens and advance their slots; a view that the next step overwrites."""
        self._sample.run(bucket_for(num_rows))
        return self._tensors.token_R[:num_rows]

    def compute(self, packed: PackedRows, arrays: PackedArrays) -> torch.Tensor:
        """Hidden states of all query tokens of a packed step: a view that the next step overwrites."""
        decoder, tensors = self.decoder, self._tensors
        last_token_S = self._arena.columns.last_token_S
        embed(arrays.token_T, last_token_S, decoder.embed_VD, decoder.buffers.residual_TD, decoder.traits)
        block_size = self._pool.block_size_tokens
        gather_tables(arrays.slot_R, arrays.end_R, self._arena.table_SX, tensors.table_RX, block_size, decoder.traits)
        groups = self._groups(packed, arrays)
        places = TokenPlaces(packed.num_tokens, arrays.position_T, arrays.kv_slot_T, groups)
        return decoder.forward(places, self._pool.keys, self._pool.values)

    def sample(self, logits_QV: torch.Tensor, arrays: PackedArrays) -> torch.Tensor:
        """Choose the tokens of a packed step's sampling rows and advance their slots."""
        token_Q = self._tensors.token_R[: len(logits_QV)]
        self._choose(logits_QV, arrays.sample_slot_Q, arrays.sample_end_Q, token_Q)
        return token_Q

    def _compute_decode(self, bucket: int, num_splits: int) -> None:
        decoder, tensors, columns = self.decoder, self._tensors, self._arena.columns
        begin_decode(
            self._arena.row_slot_R[:bucket],
            columns.last_token_S,
            columns.position_S,
            self._arena.table_SX,
            decoder.embed_VD,
            decoder.buffers.residual_TD,
            tensors.position_R,
            tensors.kv_slot_R,
            tensors.end_R,
            tensors.table_RX,
            self._pool.block_size_tokens,
            decoder.traits,
        )
        group = RowGroup(
            num_tokens=bucket,
            query_start_R1=tensors.query_start_R1,
            start_R=tensors.position_R[:bucket],
            table_RX=tensors.table_RX,
            max_query_tokens=1,
            num_splits=num_splits,
        )
        places = TokenPlaces(bucket, tensors.position_R, tensors.kv_slot_R, (group,))
        decoder.logits(decoder.forward(places, self._pool.keys, self._pool.values))

    def _sample_decode(self, bucket: int) -> None:
        tensors = self._tensors
        logits_RV, slot_R = self.decoder.buffers.logits_RV[:bucket], self._arena.row_slot_R[:bucket]
        self._choose(logits_RV, slot_R, tensors.end_R[:bucket], tensors.token_R[:bucket])

    def _choose(
        self, logits_QV: torch.Tensor, slot_Q: torch.Tensor, end_Q: torch.Tensor, token_Q: torch.Tensor
    ) -> None:
        columns, nobody = self._arena.columns, self._arena.layout.nobody
        sample(logits_QV, slot_Q, end_Q, columns, self._workspace, token_Q, nobody, self.decoder.traits)

    def _groups(self, packed: PackedRows, arrays: PackedArrays) -> tuple[RowGroup, ...]:
        """Rows with several query tokens, then rows with one: each kind has its own launch of attention."""
        num_long, num_rows, table_RX = packed.num_long, packed.num_rows, self._tensors.table_RX
        long = RowGroup(
            num_tokens=packed.num_long_tokens,
            query_start_R1=arrays.query_start_R1[: num_long + 1],
            start_R=arrays.start_R[:num_long],
            table_RX=table_RX,
            max_query_tokens=packed.max_query_tokens,
            num_splits=1,
        )
        if num_long == num_rows:
            return (long,)
        short = RowGroup(
            num_tokens=packed.num_tokens,
            query_start_R1=arrays.query_start_R1[num_long:],
            start_R=arrays.start_R[num_long:],
            table_RX=table_RX[num_long:],
            max_query_tokens=1,
            num_splits=self.decoder.splits(num_rows - num_long, self.decoder.max_segments),
        )
        return (long, short) if num_long else (short,)
