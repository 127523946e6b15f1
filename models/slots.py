"""The state of the batch: what each slot knows about the sequence that sits in it.

The token histories and block tables of all slots are two arrays, so that a step gathers what it needs from them with
one index operation each. They are as wide as the longest sequence may be; the system gives memory to the part that is
written. Everything else about a slot is a `SlotState`.

    S slots        C tokens of the longest sequence        X blocks of the longest table
"""

import numpy as np
import numpy.typing as npt

from triode.ids import SlotId, TokenId
from triode.models.counts import TokenCounts
from triode.models.grammar import GuideCompiler
from triode.models.matcher import Matcher
from triode.models.sampling import SamplingParams
from triode.models.step import Admission, TableChange

IntArray = npt.NDArray[np.integer]


class SlotState:
    """One admitted sequence. `history` is the slot's row of `Slots.tokens_SC`."""

    def __init__(self, admission: Admission, history: IntArray, matcher: Matcher | None) -> None:
        self.epoch = admission.epoch
        self.params: SamplingParams = admission.params
        self.seed = admission.seed
        self.sample_index = admission.sample_index
        self.stop_token_ids = admission.stop_token_ids
        self.bad_word_ids = admission.bad_word_ids
        self.num_prompt_tokens = admission.num_prompt_tokens
        self.pooling = admission.pooling
        self.num_tokens = admission.num_tokens
        self.matcher = matcher
        """How far the output has come in its guide."""
        params = admission.params
        forbids = bool(params.logit_bias or admission.bad_word_ids or params.no_repeat_ngram_size)
        self._may_force = matcher is not None and params.logprobs is None and not forbids
        self._history = history
        history[: self.num_tokens] = np.frombuffer(admission.packed_ids, np.int32)
        self._counts: TokenCounts | None = None
        self.draws: list[float] = []
        """Random numbers for the tokens at positions `first_draw, ...` (`triode.models.draws`)."""
        self.first_draw = 0

    @property
    def tokens(self) -> IntArray:
        """Prompt and output so far; a view, valid until the slot's next admission."""
        return self._history[: self.num_tokens]

    @property
    def num_generated(self) -> int:
        """Output tokens so far."""
        return self.num_tokens - self.num_prompt_tokens

    @property
    def counts(self) -> TokenCounts:
        """Which tokens occurred, and how often; kept up to date once it has been asked for."""
        if self._counts is None:
            self._counts = TokenCounts(self.tokens, self.num_prompt_tokens)
        return self._counts

    def append(self, token_id: TokenId) -> None:
        """A sampled token becomes part of the sequence."""
        self._add(token_id)
        if self.matcher is not None:
            self.matcher.append(token_id)

    def force(self) -> list[TokenId]:
        """Append the tokens for which the guide leaves no choice, and return them.

        There are none for a sequence whose logprobs are wanted, because nobody computes them, and for one that may be
        forbidden what its guide demands: that must fail. `max_tokens` holds.
        """
        if not self._may_force or self.tokens[-1] in self.stop_token_ids:
            return []
        assert self.matcher is not None, "guides force tokens"
        assert self.params.max_tokens is not None, "max_tokens is resolved before admission"
        forced = self.matcher.force(self.params.max_tokens - self.num_generated)
        for token_id in forced:
            self._add(token_id)
        return forced

    def _add(self, token_id: TokenId) -> None:
        self._history[self.num_tokens] = token_id
        self.num_tokens += 1
        if self._counts is not None:
            self._counts.add(token_id)


class Slots:
    """All slots of the batch."""

    def __init__(
        self, num_slots: int, max_context_tokens: int, block_size_tokens: int, guides: GuideCompiler | None = None
    ) -> None:
        """Without `guides` no sequence may have one."""
        self.guides = guides
        max_blocks = -(-max_context_tokens // block_size_tokens)
        self.tokens_SC = np.zeros((num_slots, max_context_tokens), np.int32)
        self.table_SX = np.zeros((num_slots, max_blocks), np.int32)
        self._states: list[SlotState | None] = [None] * num_slots

    def admit(self, admission: Admission) -> None:
        """A sequence takes a slot; everything the slot knew before is forgotten."""
        # Block 0 belongs to nobody, so an entry that the plan never fills cannot reach another sequence's memory.
        self.table_SX[admission.slot] = 0
        self._states[admission.slot] = SlotState(admission, self.tokens_SC[admission.slot], self._matcher(admission))

    def _matcher(self, admission: Admission) -> Matcher | None:
        guide = admission.params.guide
        if guide is None:
            return None
        assert self.guides is not None, "a runner without guides admits no guided sequence"
        return self.guides.matcher(guide, list(admission.token_ids[admission.num_prompt_tokens :]))

    def change_table(self, change: TableChange) -> npt.NDArray[np.int32]:
        """Entries of a slot's block table. Returns a view of those that have changed."""
        last_block = change.first_block + len(change.block_ids)
        changed = self.table_SX[change.slot, change.first_block : last_block]
        changed[:] = change.block_ids
        return changed

    def state(self, slot: SlotId, epoch: int) -> SlotState:
        """The sequence in a slot, which must be that of `epoch`."""
        state = self._states[slot]
        assert state is not None, f"slot {slot} is used before its first admission"
        assert state.epoch == epoch, f"slot {slot} is at epoch {state.epoch}, the plan says {epoch}"
        return state
