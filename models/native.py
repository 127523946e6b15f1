"""NativeDecoder: a `Decoder` whose step is one call into compiled code.

It takes and gives what `Decoder` does. Its numbers differ from the torch kernels' in the last bits (residual stream and
logits are float32 throughout, sums run in another order), and keep the same promise: a token's result depends on its
own sequence alone.

    T packed tokens     R rows     W wanted tokens     D hidden     V vocab     P blocks     B block size     K KV heads
    H head dim
"""

import ctypes
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from triode.cache.pool import elements_per_head
from triode.kernels.native.isa import InstructionSet
from triode.kernels.native.library import BatchStruct, NativeLibrary, OrderStruct, RanksStruct
from triode.kernels.native.team import Team
from triode.models.batch import StepBatch
from triode.models.config import ModelConfig
from triode.models.ordered import DecodingRun, OrderBook, OrderedStep, PendingTokens, Results
from triode.models.packed import ALIGNMENT_BYTES, PANEL, PackedModel, rounded_up
from triode.models.quantization import NOT_QUANTIZED, WeightPlan
from triode.models.weights import DecoderWeights, LayerWeights

DTYPES = (torch.float32, torch.bfloat16)
OPERATIONS = ("linear", "rms_norm", "rotary", "store_kv", "swiglu", "paged_attention")


@dataclass(frozen=True, slots=True)
class NativeKernels:
    """What a runner asks of a decoder's kernels."""

    names: dict[str, str]
    row_multiple: int = 1


def native_names(isa: InstructionSet, plan: WeightPlan = NOT_QUANTIZED) -> dict[str, str]:
    """Operation to implementation, for a build."""
    names = dict.fromkeys(OPERATIONS, f"native ({isa.name})")
    return names if plan.is_plain else names | {"linear": f"native ({isa.name}, {plan})"}


class NativeDecoder:
    """Packs the weights once, which may be dropped then, and computes steps from the packed copy.

    A step runs on as many threads as torch would use (`torch.get_num_threads`).

    Args:
        config: the model's sizes.
        weights: its tensors.
        library: what computes with them.
        layers: taken instead of `weights.layers`, one at a time, so that each can be freed before the next is packed.
        plan: how each matrix is kept.
        ranks: the processes that compute the model together; `config` and `weights` are then this one's part.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: DecoderWeights,
        library: NativeLibrary,
        layers: Iterable[LayerWeights] | None = None,
        plan: WeightPlan = NOT_QUANTIZED,
        ranks: RanksStruct | None = None,
    ) -> None:
        if weights.embed_VD.dtype not in DTYPES:
            raise ValueError(f"dtype must be float32 or bfloat16 for native kernels, got {weights.embed_VD.dtype}")
        self.config = config
        self.kernels = NativeKernels(native_names(library.isa, plan))
        self.device = torch.device("cpu")
        self.dtype = weights.embed_VD.dtype
        self._library = library
        layers = weights.layers if layers is None else layers
        self._memory = PackedModel(library, config, weights, layers, plan, ranks)
        self._model = self._memory.model
        library.check(self._model)
        self._team = Team(library, torch.get_num_threads())
        self._scratch = torch.empty(0, dtype=torch.uint8)
        self._orders: OrderBook | None = None
        self._pool: tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]] | None = None
        self._pool_addresses = (_addresses(()), _addresses(()))

    @property
    def matrices_bytes(self) -> int:
        """Of all that a token is multiplied with, which is read once a step."""
        return self._memory.matrices_bytes

    @property
    def weights_bytes(self) -> int:
        """Of all that is kept of the weights."""
        return self._memory.num_bytes

    def forward(
        self, batch: StepBatch, keys_PBKH: Sequence[torch.Tensor], values_PBKH: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        """Compute one step and store its keys and values.

        Args:
            batch: the step's tokens, without padding.
            keys_PBKH: each layer's keys (`KVPool.keys`), contiguous, in the dtype of the weights or int8.
            values_PBKH: each layer's values.

        Returns:
            The hidden states after the final norm that the batch wants, [W, D].

        Raises:
            ValueError: the batch's arrays contradict each other or name what does not exist; nothing was computed.
        """
        self._wait()
        batch_struct, hidden_WD, kept = self._batch(batch, keys_PBKH, values_PBKH)
        team = self._current_team()
        scratch = self._working_memory(batch_struct.num_tokens, team.num_threads)
        self._library.forward(self._model, batch_struct, scratch, team.handle)
        # What the struct points to was needed until here.
        del kept
        return hidden_WD

    def begin_orders(self) -> None:
        """Start the thread that `order` needs, if it has not been started.

        Raises:
            OSError: the system starts no more threads.
        """
        if self._orders is None:
            self._orders = OrderBook(self._library)

    def order(
        self,
        batch: StepBatch,
        keys_PBKH: Sequence[torch.Tensor],
        values_PBKH: Sequence[torch.Tensor],
        pending: PendingTokens,
        before: OrderedStep | None,
    ) -> tuple[OrderedStep, DecodingRun | None]:
        """Have a step computed when those before it are done, and the likeliest tokens behind those that it wants.

        Args:
            batch: as for `forward`; tokens that are pending may be anything. The library may change its arrays.
            keys_PBKH: as for `forward`.
            values_PBKH: as for `forward`.
            pending: those of its tokens that the order before it finds.
            before: that order; None if none is pending.

        Returns:
            What `wait` takes, and, if each row has one query token, which is wanted, what goes on from there.
        """
        self.begin_orders()
        assert self._orders is not None, "orders have begun"
        batch_struct, hidden_WD, kept = self._batch(batch, keys_PBKH, values_PBKH)
        team, num_tokens, num_wanted = self._current_team(), batch_struct.num_tokens, len(hidden_WD)
        results = Results(num_wanted)
        struct = OrderStruct(
            model=ctypes.pointer(self._model),
            batch=batch_struct,
            scratch=self._working_memory(num_tokens, team.num_threads),
            team=team.handle,
            num_pending=len(pending.index_N),
            token_ids=batch_struct.token_ids,
            pending=pending.index_N.ctypes.data,
            sources=pending.source_N.ctypes.data,
            previous_tokens=None if before is None else before.token_S.ctypes.data,
        )
        results.fill(struct)
        previous = None if before is None else before.token_S
        memory = (self._memory, self._scratch, team, keys_PBKH, values_PBKH)
        everything = (kept, memory, batch, hidden_WD, pending, previous, results)
        step = OrderedStep(results.token_S, results.outcome, everything)
        self._orders.submit(step, struct)
        if not len(batch.rows.start_R) == num_tokens == num_wanted:
            return step, None
        table_RC = batch.rows.block_table_RC
        assert table_RC.flags.c_contiguous, "the library reads the table to which the run adds blocks, not a copy"
        return step, DecodingRun(struct, results, everything, table_RC)

    def go_on(self, run: DecodingRun) -> OrderedStep:
        """Order the step after the last one that was ordered, which was one of the run."""
        assert self._orders is not None, "a run begins with an order"
        step, struct = run.next()
        self._orders.submit(step, struct)
        return step

    def wait(self, step: OrderedStep, wait_s: float | None = None) -> bool:
        """Whether an ordered step is done, after waiting for at most `wait_s`; None is for ever."""
        assert self._orders is not None, "only what was ordered is waited for"
        return self._orders.wait(step, wait_s)

    def logits(self, hidden_RD: torch.Tensor) -> torch.Tensor:
        """float32 logits [R, V] of the rows that need them; V is the head's part of the vocabulary."""
        self._wait()
        hidden_RD = hidden_RD.contiguous()
        num_rows, team = len(hidden_RD), self._current_team()
        out = torch.empty(num_rows, rounded_up(self._memory.num_outputs, PANEL))
        scratch = self._working_memory(num_rows, team.num_threads)
        self._library.logits(self._model, hidden_RD.data_ptr(), num_rows, out.data_ptr(), scratch, team.handle)
        return out[:, : self._memory.num_outputs]

    def likeliest(self, hidden_RD: torch.Tensor) -> torch.Tensor:
        """The token with the largest logit of each row, [R], int64, the lowest id among equals; -1 where there is none.

        Logits are compared as they are computed, and never kept."""
        self._wait()
        hidden_RD = hidden_RD.contiguous()
        num_rows, team = len(hidden_RD), self._current_team()
        token_R = torch.empty(num_rows, dtype=torch.int64)
        scratch = self._working_memory(num_rows, team.num_threads)
        self._library.likeliest(self._model, hidden_RD.data_ptr(), num_rows, token_R.data_ptr(), scratch, team.handle)
        return token_R

    def _wait(self) -> None:
        """Until nothing is computed in the background."""
        if self._orders is not None:
            self._orders.wait_for_all()

    def _batch(
        self, batch: StepBatch, keys_PBKH: Sequence[torch.Tensor], values_PBKH: Sequence[torch.Tensor]
    ) -> tuple[BatchStruct, torch.Tensor, tuple[object, ...]]:
        """A step's struct, the hidden states that it wants [W, D], and what must live as long as the struct."""
        self._bind_pool(keys_PBKH, values_PBKH)
        rows = batch.rows
        num_tokens, num_rows = len(batch.token_ids_T), len(rows.start_R)
        ends = (len(rows.query_start_R1), len(batch.wanted_start_R1))
        lengths = (batch.positions_PT.numel(), len(batch.slot_T), *ends, len(rows.block_table_RC))
        if lengths != (num_tokens, num_tokens, num_rows + 1, num_rows + 1, num_rows):
            raise ValueError(
                "batch must have a position and a slot for each token, and two ends and a block table for each row, "
                f"got {lengths} of them for {num_tokens} tokens in {num_rows} rows"
            )
        tables = (rows.query_start_R1, rows.start_R, rows.block_table_RC, batch.wanted_start_R1)
        arrays = [np.ascontiguousarray(table) for table in tables]
        query_start_R1, start_R, block_table_RC, wanted_start_R1 = arrays
        # Whatever the table says: the library refuses one that wants more than there is.
        num_wanted = min(max(batch.num_wanted, 0), num_tokens)
        hidden_WD = torch.empty(num_wanted, self.config.hidden_size, dtype=self.dtype)
        struct = BatchStruct(
            num_tokens=num_tokens,
            num_rows=num_rows,
            table_columns=block_table_RC.shape[1],
            block_size_tokens=rows.block_size_tokens,
            num_blocks=len(keys_PBKH[0]),
            kv_is_int8=keys_PBKH[0].dtype == torch.int8,
            token_ids=batch.token_ids_T.data_ptr(),
            positions=batch.positions_PT.data_ptr(),
            slots=batch.slot_T.data_ptr(),
            query_start=query_start_R1.ctypes.data,
            start=start_R.ctypes.data,
            block_table=block_table_RC.ctypes.data,
            keys=ctypes.addressof(self._pool_addresses[0]),
            values=ctypes.addressof(self._pool_addresses[1]),
            wanted_start=wanted_start_R1.ctypes.data,
            hidden=hidden_WD.data_ptr(),
        )
        return struct, hidden_WD, (*arrays, self._pool_addresses)

    def _current_team(self) -> Team:
        """As many threads as torch would use; others are started when their number changes."""
        num_threads = torch.get_num_threads()
        if self._team.num_threads != num_threads:
            self._wait()
            self._team.close()
            self._team = Team(self._library, num_threads)
        return self._team

    def _bind_pool(self, keys_PBKH: Sequence[torch.Tensor], values_PBKH: Sequence[torch.Tensor]) -> None:
        """Look up where the cache is, once a pool."""
        if self._pool is not None and self._pool[0] is keys_PBKH and self._pool[1] is values_PBKH:
            return
        config = self.config
        for tensor in (*keys_PBKH, *values_PBKH):
            assert tensor.is_contiguous(), "the cache is contiguous"
            assert tensor.dtype == keys_PBKH[0].dtype, "keys and values are of one dtype"
            assert tensor.dtype in (self.dtype, torch.int8), f"the cache is {self.dtype} or int8"
            elements = elements_per_head(config.head_dim, tensor.dtype)
            assert tensor.shape[2:] == (config.num_kv_heads, elements), "the cache has the model's heads"
        assert len(keys_PBKH) == len(values_PBKH) == config.num_layers, "the cache has the model's layers"
        self._pool = (keys_PBKH, values_PBKH)
        self._pool_addresses = (_addresses(keys_PBKH), _addresses(values_PBKH))

    def _working_memory(self, num_tokens: int, num_threads: int) -> int:
        """The address of enough scratch memory; it grows with the largest step."""
        needed = self._library.scratch_bytes(self._model, num_tokens, num_threads)
        if len(self._scratch) < needed + ALIGNMENT_BYTES:
            # Whatever is left in it must not be mistaken for numbers, which a test proves with NaN.
            self._scratch = torch.full((needed + ALIGNMENT_BYTES,), 0xFF, dtype=torch.uint8)
        return rounded_up(self._scratch.data_ptr(), ALIGNMENT_BYTES)


def _addresses(tensors: Sequence[torch.Tensor]) -> "ctypes.Array[ctypes.c_void_p]":
    return (ctypes.c_void_p * len(tensors))(*(tensor.data_ptr() for tensor in tensors))
