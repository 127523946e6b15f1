"""A scheduler between a real cache manager and a runner that computes nothing but checks everything.

The runner keeps slots and block contents as the real one does: each row "writes" its tokens into the blocks of its
table and first reads back what should be there. A sampled token is a hash of the tokens that the table holds, so a wrong
block, a stale copy or a lost token changes the output.
"""

import zlib
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import chain

from triode.actors.messages import (
    Cancel,
    DetokenizerInbox,
    Embedded,
    Ended,
    FinishReason,
    Match,
    Opened,
    PromptScored,
    RequestStatus,
    Reserve,
    Sampled,
    SetPriority,
    StatusChanged,
    Stopped,
    Tokenized,
)
from triode.actors.scheduler.config import SchedulerConfig
from triode.actors.scheduler.policy import Scheduler
from triode.cache.config import CacheConfig
from triode.cache.manager import CacheManager
from triode.ids import BlockId, RequestId, SlotId, TokenId, pack_tokens
from triode.models.sampling import SamplingParams
from triode.models.step import Admission, Output, Pooling, RowError, StepPlan, StepResult, TokenLogprobs

VOCAB = 50
SAMPLING = (Output.SAMPLE, Output.PROMPT_LOGPROBS_AND_SAMPLE)


def next_token(tokens: Iterable[int], seed: int, sample_index: int) -> TokenId:
    """The token that follows, whoever asks."""
    return TokenId(zlib.crc32(repr((tuple(tokens), seed, sample_index)).encode()) % VOCAB)


def forces(tokens: list[TokenId], admission: Admission) -> bool:
    """Whether the next token is known at once: in a guided sequence two of three are."""
    max_tokens = admission.params.max_tokens
    assert max_tokens is not None
    has_room = len(tokens) < admission.num_prompt_tokens + max_tokens
    return admission.params.guide is not None and has_room and tokens[-1] % 3 > 0


def expected_output(tokenized: Tokenized, sample_index: int) -> list[TokenId]:
    """What one sample must be, however it was scheduled."""
    tokens = list(tokenized.token_ids)
    assert tokenized.params.max_tokens is not None
    for _ in range(tokenized.params.max_tokens):
        token = next_token(tokens, tokenized.seed, sample_index)
        tokens.append(token)
        if token in tokenized.stop_token_ids:
            break
    return tokens[len(tokenized.token_ids) :]


@dataclass
class Slot:
    admission: Admission
    tokens: list[TokenId]
    table: dict[int, BlockId] = field(default_factory=dict)


class CheckingRunner:
    """Runs plans one after the other, as a stream does, when they are launched."""

    def __init__(self, block_size: int, max_running: int) -> None:
        self.block_size = block_size
        self.max_running = max_running
        self.slots: dict[SlotId, Slot] = {}
        self.blocks: dict[BlockId, dict[int, tuple[int, TokenId]]] = {}
        self.impossible_step: int | None = None
        """In this step no row has a possible token."""

    def run(self, plan: StepPlan) -> StepResult:
        for admission in plan.admissions:
            self.slots[admission.slot] = Slot(admission, list(admission.token_ids))
        for change in plan.table_changes:
            for index, block in enumerate(change.block_ids, change.first_block):
                assert block != 0, "block 0 belongs to nobody"
                self.slots[change.slot].table[index] = block
        for copy in plan.copies:
            self.blocks[copy.target] = dict(self.blocks.get(copy.source, {}))
        assert len(set(plan.slots)) == len(plan.slots) <= self.max_running
        # All rows of a step write before any of them reads, layer by layer.
        for row in range(len(plan.slots)):
            self._write(plan, row)
        tokens = [self._compute(plan, row) for row in range(len(plan.slots))]
        is_impossible = plan.step_id == self.impossible_step
        return StepResult(
            step_id=plan.step_id,
            slots=plan.slots,
            epochs=plan.epochs,
            num_accepted=tuple(0 if is_impossible else len(new) for new in tokens),
            token_ids=() if is_impossible else tuple(chain.from_iterable(tokens)),
            errors=(RowError("nothing is possible"),) * len(tokens) if is_impossible else None,
            prompt_logprobs=tuple(self._scores(plan, row) for row in range(len(plan.slots))),
            embeddings=tuple((1.0,) if output is Output.HIDDEN else () for output in plan.outputs),
        )

    def _slot(self, plan: StepPlan, row: int) -> Slot:
        slot = self.slots[plan.slots[row]]
        assert slot.admission.epoch == plan.epochs[row], "the row's sequence is the slot's"
        return slot

    def _write(self, plan: StepPlan, row: int) -> None:
        slot = self._slot(plan, row)
        start, count = plan.start_positions[row], plan.num_query_tokens[row]
        assert count >= 1
        assert start + count <= len(slot.tokens), "only known tokens are computed"
        for position in range(start, start + count):
            block = slot.table[position // self.block_size]
            self.blocks.setdefault(block, {})[position % self.block_size] = (position, slot.tokens[position])

    def _compute(self, plan: StepPlan, row: int) -> list[TokenId]:
        slot = self._slot(plan, row)
        end = plan.start_positions[row] + plan.num_query_tokens[row]
        for position in range(end):
            block = slot.table[position // self.block_size]
            held = self.blocks[block].get(position % self.block_size)
            assert held == (position, slot.tokens[position]), "a table reads back its own tokens"
        if plan.outputs[row] not in SAMPLING:
            return []
        admission = slot.admission
        if admission.params.guide is not None and end < len(slot.tokens):
            # Planned before anyone could know of forced tokens.
            return []
        assert end == len(slot.tokens), "a sample follows the last known token"
        new = [self._append(slot)]
        while forces(slot.tokens, admission) and new[-1] not in admission.stop_token_ids:
            new.append(self._append(slot))
        return new

    def _append(self, slot: Slot) -> TokenId:
        token = next_token(slot.tokens, slot.admission.seed, slot.admission.sample_index)
        slot.tokens.append(token)
        return token

    def _scores(self, plan: StepPlan, row: int) -> tuple[TokenLogprobs, ...]:
        if plan.outputs[row] not in (Output.PROMPT_LOGPROBS, Output.PROMPT_LOGPROBS_AND_SAMPLE):
            return ()
        slot = self._slot(plan, row)
        start = plan.start_positions[row]
        following = slot.tokens[start + 1 : start + 1 + plan.num_query_tokens[row]]
        return tuple(TokenLogprobs(token, 0.0, 1) for token in following)


@dataclass(frozen=True)
class Meanwhile:
    """What the scheduler hears between a question to the cache manager and the answer."""

    num_results: int
    """Of launched steps, the oldest first."""
    num_stops: int
    returns_blocks: bool
    """Whether the cache manager hears of released blocks before the answer is read, and not only with the next question."""


@dataclass
class Seen:
    """What the detokenizer has been told about one request."""

    tokenized: Tokenized
    outputs: dict[int, list[TokenId]] = field(default_factory=dict)
    reasons: dict[int, FinishReason] = field(default_factory=dict)
    scored: list[TokenId] = field(default_factory=list)
    ended: Ended | None = None
    is_embedded: bool = False
    num_cached_tokens: int = 0
    stop_after: int | None = None
    """After how many tokens the detokenizer finds a stop string."""

    @property
    def is_over(self) -> bool:
        return self.ended is not None or self.is_embedded or len(self.reasons) == self.tokenized.params.n


class World:
    """Drives the scheduler core message by message, with time as a counter."""

    def __init__(
        self,
        config: SchedulerConfig,
        *,
        num_blocks: int,
        block_size: int = 16,
        max_in_flight: int = 2,
        prefix_cache: bool = True,
    ) -> None:
        self.config = config
        self.scheduler = Scheduler(config, max_in_flight=max_in_flight)
        self.cache = CacheManager(num_blocks, CacheConfig(block_size_tokens=block_size, prefix_cache=prefix_cache))  # type: ignore[arg-type]
        self.runner = CheckingRunner(block_size, config.max_running)
        self.capacity = (num_blocks - 1) * block_size
        self.in_flight: deque[StepResult] = deque()
        self.seen: dict[RequestId, Seen] = {}
        self.plans: list[StepPlan] = []
        self.aborted: set[RequestId] = set()
        self.stops: deque[Stopped] = deque()
        self.doomed: list[RequestId] = []
        """Cancelled while the next grant is on its way."""
        self.meanwhile: deque[Meanwhile] = deque()
        """What happens while the next answers are on their way, Matched and Reserved."""
        self.now_s = 0.0
        self._arrivals = 0

    def submit(
        self,
        tokens: Iterable[int],
        params: SamplingParams,
        *,
        priority: int = 0,
        stop_token_ids: tuple[int, ...] = (),
        pooling: Pooling | None = None,
        deadline_at_s: float | None = None,
        salt: str | None = None,
        stop_after: int | None = None,
    ) -> RequestId:
        request_id = RequestId(f"r{self._arrivals}")
        tokenized = Tokenized(
            request_id=request_id,
            arrival=self._arrivals,
            token_ids=(token_ids := tuple(map(TokenId, tokens))),
            packed_ids=pack_tokens(token_ids),
            params=params,
            seed=self._arrivals % 3,
            stop_token_ids=tuple(map(TokenId, stop_token_ids)),
            priority=priority,
            cache_salt=salt,
            deadline_at_s=deadline_at_s,
            pooling=pooling,
        )
        self._arrivals += 1
        self.seen[request_id] = Seen(tokenized, stop_after=stop_after)
        self.scheduler.add(tokenized)
        self.settle()
        return request_id

    def cancel(self, request_id: RequestId) -> None:
        self._abort(request_id)
        self.settle()

    def cancel_when_granted(self, request_id: RequestId) -> None:
        """Cancel it between the next Reserve and its answer, if it is not over by then."""
        self.doomed.append(request_id)

    def set_priority(self, request_id: RequestId, priority: int) -> None:
        self.scheduler.set_priority(SetPriority(request_id, self.seen[request_id].tokenized.arrival, priority))

    def retire(self) -> bool:
        """Read the oldest launched step. Returns whether there was one."""
        if not self.in_flight:
            return False
        self._read_step()
        self.settle()
        return True

    def settle_stop(self) -> bool:
        """Deliver the detokenizer's oldest word on where a text ends. Returns whether there was one."""
        if not self.stops:
            return False
        self.scheduler.stop(self.stops.popleft())
        self.settle()
        return True

    def run_to_the_end(self, max_steps: int = 5_000) -> None:
        for _ in range(max_steps):
            if not self.settle_stop() and not self.retire():
                return
        raise AssertionError(f"{max_steps} steps did not suffice: {self.scheduler.statistics()}")

    def settle(self) -> None:
        """What the shell does after each message, and what the others answer, until nobody has anything to say."""
        while True:
            self.now_s += 0.001
            self.scheduler.expire(self.now_s)
            self._return_blocks()
            question = self.scheduler.wants(self.now_s)
            has_told = self._tell_news()
            if question is not None:
                self._ask(question)
            elif not has_told:
                return

    def _ask(self, question: Match | Reserve) -> None:
        if isinstance(question, Match):
            matched = self.cache.match(question)
            self._let_others_speak()
            reserve = self.scheduler.matched(matched, self.now_s)
            if reserve is None:
                return
            question = reserve
        reserved = self.cache.reserve(question)
        if self.doomed:
            # What was decided before a cancellation may be heard after it.
            self._tell_news()
        while self.doomed:
            if not self.seen[request_id := self.doomed.pop()].is_over:
                self._abort(request_id)
        self._let_others_speak()
        if plan := self.scheduler.plan(reserved):
            assert sum(plan.num_query_tokens) <= self.config.max_step_tokens, "the budget is never exceeded"
            planned = {row.sequence.request.request_id for row in self.scheduler._launched[-1].rows}
            assert not planned & self.aborted, "no step after its cancellation includes a request"
            self.plans.append(plan)
            self.in_flight.append(self.runner.run(plan))
            if launched := self.scheduler.outbox.take_launched():
                self.cache.launched(launched)

    def _let_others_speak(self) -> None:
        if not self.meanwhile:
            return
        spoken = self.meanwhile.popleft()
        for _ in range(min(spoken.num_results, len(self.in_flight))):
            self._read_step()
        for _ in range(min(spoken.num_stops, len(self.stops))):
            self.scheduler.stop(self.stops.popleft())
        assert self.scheduler.wants(self.now_s) is None, "one question at a time"
        if spoken.returns_blocks:
            self._return_blocks()

    def _read_step(self) -> None:
        self.scheduler.commit(self.in_flight.popleft())

    def _return_blocks(self) -> None:
        if release := self.scheduler.outbox.take_releases(self.now_s):
            self.cache.release(release)

    def _abort(self, request_id: RequestId) -> None:
        self.aborted.add(request_id)
        self.scheduler.abort(Cancel(request_id, self.seen[request_id].tokenized.arrival))

    def _tell_news(self) -> bool:
        messages = self.scheduler.outbox.take_for_detokenizer()
        for message in messages:
            self._tell(message)
        return bool(messages)

    def _tell(self, message: DetokenizerInbox) -> None:
        match message:
            case Sampled():
                rows = zip(
                    message.request_ids, message.sample_indices, message.token_ids, message.finish_reasons, strict=True
                )
                for request_id, index, token, reason in rows:
                    self._sampled(request_id, index, token, reason)
            case PromptScored():
                self.seen[message.request_id].scored.extend(score.token_id for score in message.logprobs)
            case Embedded():
                self.seen[message.request_id].is_embedded = True
            case Ended():
                seen = self.seen[message.request_id]
                assert seen.ended is None, "a request ends once"
                seen.ended = message
            case StatusChanged():
                for request_id, status, cached in zip(
                    message.request_ids, message.statuses, message.num_cached_tokens, strict=True
                ):
                    assert not status.is_final
                    assert status is not RequestStatus.QUEUED
                    self.seen[request_id].num_cached_tokens = cached
            case Opened():
                pass
            case _:
                raise AssertionError(message)

    def _sampled(self, request_id: RequestId, index: int, token: TokenId, reason: FinishReason | None) -> None:
        assert request_id not in self.aborted, "an aborted request is never heard of again"
        seen = self.seen[request_id]
        if index in seen.reasons and seen.stop_after is not None:
            # Sampled before the scheduler has heard of the stop.
            return
        assert index not in seen.reasons, "nothing follows a sample's last token"
        output = seen.outputs.setdefault(index, [])
        output.append(token)
        if len(output) == seen.stop_after:
            reason = FinishReason.STOP
        if reason is not None:
            seen.reasons[index] = reason
            if seen.tokenized.params.stop:
                self.stops.append(Stopped(request_id, index, len(output)))

    @property
    def returned_blocks(self) -> int:
        """Blocks that are free or would be if somebody needed them."""
        statistics = self.cache.statistics()
        return statistics.num_free_blocks + statistics.num_evictable_blocks

    def check_at_rest(self) -> None:
        """Everything has been answered, correctly, and everything has come back."""
        assert self.scheduler.statistics().num_requests == 0
        assert not self.in_flight
        self.cache.check_integrity()
        for request_id, seen in self.seen.items():
            assert seen.is_over, f"{request_id} was never answered"
            if seen.ended is None and not seen.is_embedded:
                for index in range(seen.tokenized.params.n):
                    assert seen.outputs[index] == expected_output(seen.tokenized, index)[: seen.stop_after]
                if seen.tokenized.params.prompt_logprobs is not None:
                    assert seen.scored == list(seen.tokenized.token_ids[1:]), "every prompt token is scored once"
