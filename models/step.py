"""What the scheduler asks of the runner in one step, and what the runner answers.

The runner keeps the batch: `max_running` *slots*, each holding one sequence's token history, block table, sampling
parameters and position. A plan therefore says only what changes (admissions, table changes, block copies) and which
slots compute how many tokens. Tokens are never sent twice: a slot learns its known tokens when it is admitted and
appends every token that it samples by itself, so step N+1 can be launched before anyone has read the tokens of step N.

A slot is reused, so it carries an *epoch* that grows with each admission. A result for an epoch that is no longer the
slot's is stale and its reader drops it.

    R rows of one step        T query tokens of one step        a row's query tokens are contiguous

Rows are in plan order everywhere. Within a step the runner first applies `admissions`, then `table_changes`, then
`copies` (whole KV blocks, all layers), then computes.
"""

import enum
from collections.abc import Sequence
from typing import cast

import msgspec

from triode.cache.messages import BlockCopy
from triode.ids import TOKEN_BYTES, BlockId, SlotId, StepId, TokenId
from triode.models.sampling import SamplingParams


class Output(enum.IntEnum):
    """What a row returns besides its KV entries."""

    NONE = 0
    """Nothing: a prefill chunk that does not reach the end of the known tokens."""
    SAMPLE = 1
    """One sampled token, from the last query position."""
    PROMPT_LOGPROBS = 2
    """Logprobs of the known token that follows each query position; no sample."""
    PROMPT_LOGPROBS_AND_SAMPLE = 3
    """Both: the last chunk of a prompt whose logprobs were asked for."""
    HIDDEN = 4
    """The final hidden states, pooled over all positions of the sequence (embeddings).

    Every chunk of the prompt is such a row and the slot gathers them; the chunk that ends the known tokens returns the
    result, bit for bit the same for any chunking. Nothing may be skipped by a prefix hit.
    """


class Pooling(enum.StrEnum):
    """How the final hidden states of a sequence become its embedding."""

    MEAN = "mean"
    LAST = "last"


class Admission(msgspec.Struct, frozen=True):
    """A sequence takes a slot. Everything the slot knew before is forgotten."""

    slot: SlotId
    epoch: int
    packed_ids: bytes
    """All known tokens (`triode.ids.pack_tokens`): the prompt, then what was generated before a preemption. A step waits
    for them to be sent and read, and 4,000 integers take a worker 50 times as long as their bytes."""
    num_prompt_tokens: int
    params: SamplingParams
    seed: int
    sample_index: int
    """Which of the request's `n` samples this is: part of the Philox key."""
    stop_token_ids: tuple[TokenId, ...]
    """The model's end-of-sequence tokens (unless `ignore_eos`) and the request's own; masked before `min_tokens`."""
    bad_word_ids: tuple[tuple[TokenId, ...], ...] = ()
    pooling: Pooling | None = None
    """Of a sequence whose rows are `Output.HIDDEN`."""

    @property
    def num_tokens(self) -> int:
        """How many these are."""
        return len(self.packed_ids) // TOKEN_BYTES

    @property
    def token_ids(self) -> Sequence[TokenId]:
        """`packed_ids` as integers: a view."""
        return cast("Sequence[TokenId]", memoryview(self.packed_ids).cast("I"))


class TableChange(msgspec.Struct, frozen=True):
    """Blocks `first_block, first_block + 1, ...` of a slot's block table become `block_ids`."""

    slot: SlotId
    first_block: int
    block_ids: tuple[BlockId, ...]


class StepPlan(msgspec.Struct, frozen=True, tag=True):
    """One step. The row fields are parallel tuples of length R."""

    step_id: StepId
    slots: tuple[SlotId, ...]
    epochs: tuple[int, ...]
    start_positions: tuple[int, ...]
    """Position of each row's first query token: how many tokens of the sequence are in the cache already."""
    num_query_tokens: tuple[int, ...]
    outputs: tuple[Output, ...]
    admissions: tuple[Admission, ...] = ()
    table_changes: tuple[TableChange, ...] = ()
    copies: tuple[BlockCopy, ...] = ()


class TokenLogprobs(msgspec.Struct, frozen=True, gc=False):
    """One token's log-probability, beside the most probable alternatives in descending order.

    The values are of the model's own distribution (log-softmax of the raw logits), before temperature, penalties and
    truncation, so that they do not change with the sampling parameters.
    """

    token_id: TokenId
    logprob: float
    rank: int
    """1 for the most probable token."""
    top_ids: tuple[TokenId, ...] = ()
    top_logprobs: tuple[float, ...] = ()


class RowError(msgspec.Struct, frozen=True):
    """Why a row that should have a token has none: its request fails, alone."""

    reason: str
    is_unsatisfiable: bool = True
    """Whether the request asks for what cannot be had, by its guide or its other parameters; else the model is at fault."""


class StepResult(msgspec.Struct, frozen=True, tag=True):
    """The answer to a plan. Row fields are parallel tuples of length R, in the plan's order."""

    step_id: StepId
    slots: tuple[SlotId, ...]
    epochs: tuple[int, ...]
    num_accepted: tuple[int, ...]
    """How many new tokens each row has: 0 without a sample, 1 with one, and more where a guide forces what follows.

    A row that was launched before its forced tokens were known ends before the last of them, and has none."""
    token_ids: tuple[TokenId, ...]
    """The new tokens of all rows, flat: `sum(num_accepted)` of them."""
    logprobs: tuple[TokenLogprobs | None, ...] | None = None
    """Parallel to `token_ids`, an entry where the row asked for logprobs; None when no row asked."""
    errors: tuple[RowError | None, ...] | None = None
    """Per row; None when every row is well."""
    prompt_logprobs: tuple[tuple[TokenLogprobs, ...], ...] | None = None
    """Per row, one entry a query position that has a known next token; None when no row asked."""
    embeddings: tuple[tuple[float, ...], ...] | None = None
    """Per row with `Output.HIDDEN` that ends its known tokens the pooled hidden state, else an empty tuple; None when no
    row asked."""
    forward_s: float = 0.0
    """Seconds from the start of the step to the logits."""
    sample_s: float = 0.0
    """Seconds from the logits to the tokens on the host."""
