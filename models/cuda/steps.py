"""The work of a step on the device: decode steps from the arena alone, others from arrays that the host packed.

T packed query tokens    R rows    Q rows that sample    D hidden    V vocabulary    X blocks of the longest table
"""

from collections.abc import Sequence
from functools import cache, partial

import numpy as np
import torch

from triode.cache.messages import BlockCopy
from triode.cache.pool import KVPool
from triode.kernels.paged_attention.tiles import SEGMENT_TOKENS, hopper_serves
from triode.kernels.sample.gpu import SampleWorkspace, sample
from triode.kernels.step.gpu import begin_decode, embed, gather_tables, pick, place_last, scatter
from triode.models.cuda.arena import Arena, Changes, Words
from triode.models.cuda.batch import PackedRows
from triode.models.cuda.decoder import CudaDecoder, PickedTokens
from triode.models.cuda.gpu import Gpu
from triode.models.cuda.layer import RowGroup, TokenPlaces
from triode.models.cuda.programs import Kinds, Programs, bucket_for, segment_bucket_for
from triode.models.cuda.step_tensors import NUM_PAIRS, PackedArrays, StepTensors


class DeviceSteps:
    """Steps over one decoder, pool and arena. Belongs in `Gpu.active()`."""

    def __init__(self, decoder: CudaDecoder, pool: KVPool, arena: Arena, gpu: Gpu) -> None:
        self.decoder = decoder
        self._pool = pool
        self.arena = arena
        self._gpu = gpu
        layout = arena.layout
        self._tensors = StepTensors.allocate(layout.num_rows, layout.num_entries, gpu.device)
        walks_fast = hopper_serves(decoder.buffers.attended_TNH, pool.keys[0], decoder.traits)
        # Asked before every prefill step, while the device waits.
        self._prefill_splits = cache(partial(decoder.prefill_splits, walks_fast=walks_fast))
        self._workspace = SampleWorkspace.allocate(layout.num_rows, decoder.config.vocab_size, gpu.device)
        self._forward = Programs(self._compute_decode, gpu)
        self._sample = Programs(self._sample_decode, gpu)
        self._prefill = Programs(self._compute_prefill, gpu)
        self._sample_packed = Programs(self._sample_prefill, gpu)
        self._programs = (self._forward, self._sample, self._prefill, self._sample_packed)

    @property
    def max_rows(self) -> int:
        """The most rows of one step."""
        return self.arena.layout.num_rows

    def close(self) -> None:
        """Drop what was captured. Memory then goes with the last reference, and waits for no collector."""
        for programs in self._programs:
            programs.forget()

    def kinds(self) -> Kinds:
        """The kinds of captured work that have been done."""
        return tuple(programs.kinds for programs in self._programs)

    def capture(self, kinds: Kinds) -> None:
        """Capture work of these kinds."""
        for programs, sizes in zip(self._programs, kinds, strict=True):
            for each in sizes:
                programs.capture(*each)

    def prepare(self, changes: Changes, copies: Sequence[BlockCopy]) -> None:
        """Bring the arena up to date, then copy blocks."""
        self.arena.apply(changes)
        self.copy_blocks(copies)

    def copy_blocks(self, copies: Sequence[BlockCopy]) -> None:
        """Before the step computes."""
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

    def ends_decode(self, num_rows: int) -> torch.Tensor:
        """Where their samples go; a view that the next step overwrites."""
        return self._tensors.end_R[:num_rows]

    def compute(self, packed: PackedRows, arrays: PackedArrays) -> torch.Tensor:
        """Hidden states of all query tokens of a packed step: a view that the next step overwrites."""
        return self._compute(arrays, packed.num_tokens, self._groups(packed, arrays))

    def compute_logits(self, packed: PackedRows, arrays: PackedArrays) -> torch.Tensor:
        """Logits of the rows of a packed step that sample: a view that the next step overwrites."""
        return self._compute_logits(arrays, packed.num_tokens, self._groups(packed, arrays))

    def upload(self, packed: PackedRows, changes: Changes) -> PackedArrays:
        """Bring the arena up to date; a packed step's arrays, in memory of their own. Both are sent together."""
        words = self._gpu.upload(self._joined(packed, changes))
        scatter(self.arena.words, words[: 2 * NUM_PAIRS], self.decoder.traits)
        return PackedArrays(words[2 * NUM_PAIRS :], packed.num_tokens, packed.num_rows, packed.num_sampled)

    def logits(self, hidden_TD: torch.Tensor, arrays: PackedArrays) -> torch.Tensor:
        """Of the rows that sample, from the hidden states of all: a view that the next step overwrites."""
        # The residual stream has ended; its buffer is free.
        hidden_QD = self.decoder.buffers.x_TD[: len(arrays.sample_token_Q)]
        pick(arrays.sample_token_Q, hidden_TD, None, hidden_QD, None, self.decoder.traits)
        return self.decoder.logits(hidden_QD)

    def sample(self, logits_QV: torch.Tensor, arrays: PackedArrays) -> torch.Tensor:
        """Choose the tokens of a packed step's sampling rows and advance their slots."""
        token_Q = self._tensors.token_R[: len(logits_QV)]
        self._choose(logits_QV, arrays.sample_slot_Q, arrays.sample_end_Q, token_Q)
        return token_Q

    def prefill(self, packed: PackedRows, changes: Changes) -> torch.Tensor:
        """Bring the arena up to date; logits of the sampling rows of a packed step of fixed shape."""
        words = self._joined(packed, changes)
        self._gpu.upload(words, self._tensors.words[: len(words)])
        sizes = packed.num_tokens, packed.num_rows
        splits = self._prefill_splits(*sizes, -(-packed.longest // SEGMENT_TOKENS) * SEGMENT_TOKENS)
        self._prefill.run(*sizes, packed.num_sampled, splits)
        return self.decoder.buffers.logits_RV[: len(packed.sampled)]

    def sample_prefill(self, packed: PackedRows) -> torch.Tensor:
        """Choose their tokens and advance their slots; a view that the next step overwrites."""
        self._sample_packed.run(packed.num_rows)
        return self._tensors.token_R[: len(packed.sampled)]

    def ends_prefill(self, packed: PackedRows) -> torch.Tensor:
        """Where their samples go; a view that the next step overwrites."""
        return self._fixed_arrays(0, packed.num_rows, packed.num_sampled).sample_end_Q[: len(packed.sampled)]

    def _joined(self, packed: PackedRows, changes: Changes) -> Words:
        return np.concatenate([self.arena.pairs(changes, NUM_PAIRS), packed.words])

    def _compute_prefill(self, num_tokens: int, num_rows: int, num_sampled: int, num_splits: int) -> None:
        scatter(self.arena.words, self._tensors.words[: 2 * NUM_PAIRS], self.decoder.traits)
        arrays = self._fixed_arrays(num_tokens, num_rows, num_sampled)
        group = RowGroup(
            num_tokens=num_tokens,
            query_start_R1=arrays.query_start_R1,
            start_R=arrays.start_R,
            table_RX=self._tensors.table_RX,
            max_query_tokens=num_tokens,
            num_splits=num_splits,
        )
        self._compute_logits(arrays, num_tokens, (group,))

    def _sample_prefill(self, num_rows: int) -> None:
        # Where these arrays lie does not depend on the number of tokens.
        arrays = self._fixed_arrays(0, num_rows, num_rows)
        self.sample(self.decoder.buffers.logits_RV[:num_rows], arrays)

    def _fixed_arrays(self, num_tokens: int, num_rows: int, num_sampled: int) -> PackedArrays:
        return PackedArrays(self._tensors.words[2 * NUM_PAIRS :], num_tokens, num_rows, num_sampled)

    def _compute_logits(self, arrays: PackedArrays, num_tokens: int, groups: tuple[RowGroup, ...]) -> torch.Tensor:
        num_sampled = len(arrays.sample_token_Q)
        if self.decoder.gains_by_picking(num_tokens, num_sampled):
            hidden_QD = self._compute(arrays, num_tokens, groups, self._picked(arrays))
            return self.decoder.logits(hidden_QD) if num_sampled else hidden_QD
        hidden_TD = self._compute(arrays, num_tokens, groups)
        return self.logits(hidden_TD, arrays) if num_sampled else hidden_TD[:0]

    def _picked(self, arrays: PackedArrays) -> PickedTokens:
        """The last tokens of the rows that sample."""
        tensors, table_SX, num_rows = self._tensors, self.arena.table_SX, len(arrays.sample_token_Q)
        position_R, kv_slot_R, table_RX = tensors.position_R, tensors.kv_slot_R, tensors.picked_table_RX
        if not num_rows:
            return PickedTokens(arrays.sample_token_Q, TokenPlaces(0, position_R, kv_slot_R, ()))
        place_last(
            arrays.sample_slot_Q,
            arrays.sample_end_Q,
            table_SX,
            position_R,
            kv_slot_R,
            table_RX,
            self._pool.block_size_tokens,
            self.decoder.traits,
        )
        num_splits = self.decoder.splits(num_rows, self.decoder.max_segments)
        return PickedTokens(arrays.sample_token_Q, self._places(num_rows, table_RX, num_splits))

    def _places(self, num_rows: int, table_RX: torch.Tensor, num_splits: int) -> TokenPlaces:
        """Rows of one token each, at `position_R`."""
        tensors = self._tensors
        group = RowGroup(
            num_tokens=num_rows,
            query_start_R1=tensors.query_start_R1,
            start_R=tensors.position_R[:num_rows],
            table_RX=table_RX,
            max_query_tokens=1,
            num_splits=num_splits,
        )
        return TokenPlaces(num_rows, tensors.position_R, tensors.kv_slot_R, (group,))

    def _compute(
        self,
        arrays: PackedArrays,
        num_tokens: int,
        groups: tuple[RowGroup, ...],
        picked: PickedTokens | None = None,
    ) -> torch.Tensor:
        decoder, tensors, block_size = self.decoder, self._tensors, self._pool.block_size_tokens
        assert num_tokens <= decoder.max_tokens, f"a step of {num_tokens} tokens"
        last_token_S = self.arena.columns.last_token_S
        embed(arrays.token_T, last_token_S, decoder.embed_VD, decoder.buffers.residual_TD, decoder.traits)
        table_SX = self.arena.table_SX
        gather_tables(arrays.slot_R, arrays.end_R, table_SX, tensors.table_RX, block_size, decoder.traits)
        places = TokenPlaces(num_tokens, arrays.position_T, arrays.kv_slot_T, groups)
        return decoder.forward(places, self._pool.keys, self._pool.values, picked)

    def _compute_decode(self, bucket: int, num_splits: int) -> None:
        decoder, tensors, columns = self.decoder, self._tensors, self.arena.columns
        begin_decode(
            self.arena.row_slot_R[:bucket],
            columns.last_token_S,
            columns.position_S,
            self.arena.table_SX,
            decoder.embed_VD,
            decoder.buffers.residual_TD,
            tensors.position_R,
            tensors.kv_slot_R,
            tensors.end_R,
            tensors.table_RX,
            self._pool.block_size_tokens,
            decoder.traits,
        )
        places = self._places(bucket, tensors.table_RX, num_splits)
        decoder.logits(decoder.forward(places, self._pool.keys, self._pool.values))

    def _sample_decode(self, bucket: int) -> None:
        tensors = self._tensors
        logits_RV, slot_R = self.decoder.buffers.logits_RV[:bucket], self.arena.row_slot_R[:bucket]
        self._choose(logits_RV, slot_R, tensors.end_R[:bucket], tensors.token_R[:bucket])

    def _choose(
        self, logits_QV: torch.Tensor, slot_Q: torch.Tensor, end_Q: torch.Tensor, token_Q: torch.Tensor
    ) -> None:
        columns, nobody = self.arena.columns, self.arena.layout.nobody
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
