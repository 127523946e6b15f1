"""The scheduler's decisions: who is admitted, what each step computes, who gives way when memory runs out.

One step is planned in one or two round trips to the cache manager:

    wants() ── Match ──→ matched()      only when somebody can be admitted: how long is each candidate's cached prefix
    wants() ── Reserve → plan()         rows in order of (priority, arrival) with the blocks they need, and victims

The rules, each of them a property test:

* A step computes at most `max_step_tokens`. Running sequences get their next token first, what is left goes to prompts
  in order of service; since the budget exceeds `max_running`, prompts always move.
* Admission follows (priority, arrival) strictly: a candidate that finds no memory blocks those behind it, so a large
  request is never starved by small ones that keep slipping past.
* A row may take blocks from sequences that come after it in the order of service, last first. A candidate may do so only
  across a priority boundary: among equals the running ones stay. The first in order can therefore always proceed, and
  since `submit` refuses what could never fit alone, no set of requests can lock up.
* A sequence that has ended is in no later plan; its blocks and slot return when its last launched step has retired.

Steps are planned ahead: up to `max_in_flight` of them are launched before the first one's tokens are read. Nothing here
awaits, reads a clock or touches a device: time comes in as an argument, and what is to be said to others is collected in
`outbox` for the shell to send.
"""

from collections import deque

from triode.actors.messages import (
    Cancel,
    Ended,
    FinishReason,
    Match,
    Matched,
    Opened,
    Rejected,
    RequestStatus,
    Reserve,
    Reserved,
    SetPriority,
    StepPlan,
    StepResult,
    Stopped,
    Tokenized,
)
from triode.actors.scheduler.admission import ArrivalLog, match_row, pick_candidates
from triode.actors.scheduler.config import SchedulerConfig
from triode.actors.scheduler.deadlines import Deadlines
from triode.actors.scheduler.launch import Launch, build_plan
from triode.actors.scheduler.lines import Lines
from triode.actors.scheduler.outbox import Outbox
from triode.actors.scheduler.registry import Registry
from triode.actors.scheduler.request import Request, Sequence
from triode.actors.scheduler.results import read_step
from triode.actors.scheduler.statistics import SchedulerStatistics
from triode.actors.scheduler.wants import Ready, Want, build_reserve, count_ready, prompt_budget, share_budget
from triode.cache.messages import ReleaseRow
from triode.ids import SequenceId, StepId


class Scheduler:
    """Continuous batching with chunked prefill, priorities and preemption by recompute."""

    def __init__(self, config: SchedulerConfig, *, max_in_flight: int) -> None:
        self.outbox = Outbox()
        self._config = config
        self._max_in_flight = max_in_flight
        self._registry = Registry()
        self._lines = Lines(config.max_running)
        self._arrivals = ArrivalLog()
        # Set while the tokenizer still has the request, by arrival.
        self._early_priorities: dict[int, int] = {}
        self._deadlines = Deadlines()
        self._candidates: list[Sequence] = []
        self._wants: list[Want] = []
        self._is_asking = False
        # No candidate found memory; and no row at all did. Both end with the next event that may free some.
        self._is_blocked = False
        self._is_stalled = False
        # Such an event has come since the cache manager was asked: its refusals are out of date.
        self._is_outdated = False
        # Some sequence has left its line since then.
        self._has_left = False
        self._launched: deque[Launch] = deque()
        self._next_step = 0
        self._num_preemptions = 0

    # What may happen at any time

    def add(self, tokenized: Tokenized) -> None:
        """Queue a request, unless it was cancelled while its prompt was being tokenized."""
        priority = self._early_priorities.pop(tokenized.arrival, tokenized.priority)
        if self._arrivals.answer(tokenized.arrival):
            self.outbox.release_guide(tokenized)
            return
        request = self._registry.file(tokenized, priority)
        self._lines.enqueue(request.sequences[0])
        self._unblock()
        if tokenized.deadline_at_s is not None:
            self._deadlines.add(tokenized.deadline_at_s, request)
        self.outbox.to_detokenizer(
            Opened(
                request_id=request.request_id,
                num_prompt_tokens=request.num_prompt_tokens,
                seed=tokenized.seed,
                params=tokenized.params,
                prompt_token_ids=tokenized.token_ids,
            )
        )

    def reject(self, rejected: Rejected) -> None:
        """Pass on that a request was refused, unless its caller has cancelled it already."""
        self._early_priorities.pop(rejected.arrival, None)
        if not self._arrivals.answer(rejected.arrival):
            self.outbox.to_detokenizer(rejected)

    def abort(self, cancel: Cancel) -> None:
        """No later plan includes the request. A request that has ended is left alone."""
        request = self._registry.find_arrival(cancel.request_id, cancel.arrival)
        if request is not None:
            self._end(request, RequestStatus.CANCELLED, "cancelled by the caller")
        elif self._arrivals.bury(cancel.arrival):
            self.outbox.to_detokenizer(Ended(cancel.request_id, RequestStatus.CANCELLED, "cancelled by the caller"))

    def set_priority(self, message: SetPriority) -> None:
        """Move a request in the order of service."""
        request = self._registry.find_arrival(message.request_id, message.arrival)
        if request is None:
            if not self._arrivals.is_answered(message.arrival):
                self._early_priorities[message.arrival] = message.priority
            return
        request.priority = message.priority
        self._lines.reorder()
        self._unblock()

    def stop(self, stopped: Stopped) -> None:
        """The text of a sequence is settled; if it is still running, it ends here."""
        request = self._registry.find(stopped.request_id)
        if request is None:
            return
        sequence = request.sequences[stopped.sample_index]
        sequence.settle(stopped.num_tokens)
        if sequence.is_active:
            sequence.finish_reason = FinishReason.STOP
            self._leave(sequence, RequestStatus.FINISHED)
        self._retire([sequence])

    def expire(self, now_s: float) -> None:
        """Cancel the requests whose deadline has passed."""
        for request in self._deadlines.due(now_s):
            self._end(request, RequestStatus.CANCELLED, "its deadline has passed")

    @property
    def is_asking(self) -> bool:
        """Whether the cache manager owes an answer, which a plan may follow."""
        return self._is_asking

    @property
    def next_deadline_s(self) -> float:
        """When `expire` has something to do."""
        return self._deadlines.next_s

    # Planning

    def wants(self, now_s: float) -> Match | Reserve | None:
        """The next question to the cache manager; None while an answer is awaited or nothing can be launched."""
        if self._is_asking or self._is_stalled or len(self._launched) >= self._max_in_flight:
            return None
        ready = count_ready(self._lines.running)
        self._candidates = [] if self._is_blocked else self._pick(ready)
        if not self._candidates:
            return self._reserve(ready, (), now_s)
        self._is_asking = True
        return Match(tuple(match_row(sequence) for sequence in self._candidates), now_s)

    def matched(self, matched: Matched, now_s: float) -> Reserve | None:
        """Candidates know their cached prefix: ask for the blocks of the whole step."""
        self._is_asking = False
        return self._reserve(count_ready(self._lines.running), matched.num_cached_tokens, now_s)

    def plan(self, reserved: Reserved) -> StepPlan | None:
        """The step that the granted rows make; None when nothing is left to compute."""
        self._is_asking = False
        is_outdated = self._is_outdated
        for sequence_id in reserved.preempted:
            self._preempt(sequence_id)
        granted, refused = self._wants, list[Want]()
        if not all(reserved.granted):
            granted = [want for want, is_granted in zip(self._wants, reserved.granted, strict=True) if is_granted]
            refused = [want for want, is_granted in zip(self._wants, reserved.granted, strict=True) if not is_granted]
        if not is_outdated and any(want.sequence.slot is None for want in refused):
            self._is_blocked = True
        rows = [want for want in granted if want.sequence.is_active] if self._has_left else granted
        if rows:
            return self._launch(rows, reserved)
        if refused and not granted and not is_outdated:
            self._stall(refused)
        return None

    def commit(self, result: StepResult) -> None:
        """Read a launched step's tokens: tell the detokenizer, end what is complete, return what has retired."""
        launch = self._launched.popleft()
        assert launch.step_id == result.step_id, f"step {launch.step_id} retires, but the result is of {result.step_id}"
        self._is_stalled = False
        self._is_outdated = True
        reading = read_step(launch, result, self.outbox)
        for sequence in reading.ended:
            self._leave(sequence, RequestStatus.FINISHED)
        for request, error in reading.failed.items():
            self._end(request, RequestStatus.FAILED, error.reason, is_unsatisfiable=error.is_unsatisfiable)
        self._retire([*reading.stale, *reading.ended])

    def statistics(self) -> SchedulerStatistics:
        """Counts of the moment."""
        return SchedulerStatistics(
            num_running=len(self._lines.running),
            num_waiting=len(self._lines.waiting),
            num_requests=len(self._registry),
            num_steps=self._next_step,
            num_steps_in_flight=len(self._launched),
            num_preemptions=self._num_preemptions,
        )

    # Details

    def _pick(self, running: Ready) -> list[Sequence]:
        budget = prompt_budget(running, self._config.max_step_tokens)
        return pick_candidates(self._lines.waiting, self._lines.num_free_slots, budget)

    def _reserve(self, running: Ready, num_cached_tokens: tuple[int, ...], now_s: float) -> Reserve | None:
        candidates = [
            (sequence, num_cached)
            for sequence, num_cached in zip(self._candidates, num_cached_tokens, strict=True)
            if sequence.is_active
        ]
        self._wants = share_budget(running, candidates, self._config.max_step_tokens)
        if not self._wants:
            return None
        self._is_asking = True
        self._is_outdated = self._has_left = False
        return build_reserve(StepId(self._next_step), self._wants, running, now_s)

    def _launch(self, rows: list[Want], reserved: Reserved) -> StepPlan:
        admitted = [want for want in rows if want.sequence.slot is None]
        for want in admitted:
            self._admit(want)
        self._next_step += 1
        launch, plan = build_plan(reserved, rows, [want.sequence for want in admitted])
        self._launched.append(launch)
        for want in rows:
            sequence = want.sequence
            if want.num_computed < sequence.request.num_prompt_tokens:
                self.outbox.launched(sequence.sequence_id, sequence.num_computed)
                self._fork(sequence.request)
        return plan

    def _admit(self, want: Want) -> None:
        sequence = want.sequence
        if sequence.status is RequestStatus.QUEUED and sequence.sample_index == 0:
            sequence.request.num_cached_tokens = want.num_computed
        self._lines.admit(sequence)
        self.outbox.status_of(sequence.request)

    def _fork(self, request: Request) -> None:
        """Samples 1 to n-1 queue up once the prompt is computed, to share its blocks."""
        if not request.is_forked and request.sequences[0].num_computed >= request.num_prompt_tokens:
            request.is_forked = True
            for sequence in request.sequences[1:]:
                self._lines.enqueue(sequence)
                self._unblock()

    def _preempt(self, sequence_id: SequenceId) -> None:
        sequence = self._registry.sequences.get(sequence_id)
        if sequence is None or not sequence.is_active:
            return
        self._num_preemptions += 1
        self._leave(sequence, RequestStatus.PREEMPTED)
        self._lines.enqueue(sequence)

    def _leave(self, sequence: Sequence, status: RequestStatus) -> None:
        self._has_left = True
        self._lines.leave(sequence, status)
        self.outbox.status_of(sequence.request)
        self._unblock()

    def _end(self, request: Request, status: RequestStatus, reason: str, *, is_unsatisfiable: bool = False) -> None:
        if not any(sequence.is_active for sequence in request.sequences):
            # It has ended before, and its caller has been told; only its last steps have not retired.
            return
        for sequence in request.sequences:
            if sequence.is_active:
                self._leave(sequence, status)
            if sequence.num_valid_tokens is None:
                # Without the detokenizer's word, generated text may run past a stop string.
                num_generated = len(sequence.token_ids) - request.num_prompt_tokens
                sequence.settle(0 if request.has_stop_strings else num_generated)
        self.outbox.to_detokenizer(Ended(request.request_id, status, reason, is_unsatisfiable))
        self._retire(request.sequences)

    def _retire(self, sequences: list[Sequence]) -> None:
        """Return the blocks of ended sequences that no launched step includes and whose text is settled."""
        for sequence in sequences:
            if sequence.is_active or sequence.num_in_flight or sequence.sequence_id not in self._registry.sequences:
                continue
            if sequence.num_valid_tokens is None and sequence.request.has_stop_strings:
                continue
            self.outbox.release(ReleaseRow(sequence.sequence_id, sequence.pack_cacheable()))
            if self._registry.forget(sequence):
                self._deadlines.discard(sequence.request)
                self.outbox.release_guide(sequence.request.tokenized)
            self._unblock()

    def _stall(self, refused: list[Want]) -> None:
        """No row found memory. Whatever is launched or about to be released will free some, else the first row fails."""
        self._is_stalled = True
        if self._launched or any(not sequence.is_active for sequence in self._registry.sequences.values()):
            return
        request = refused[0].sequence.request
        reason = (
            f"its next {refused[0].num_tokens} tokens find no free block although nothing else runs: unpin cached "
            f"prefixes or give the KV cache more memory"
        )
        self._end(request, RequestStatus.FAILED, reason)

    def _unblock(self) -> None:
        self._is_blocked = False
        self._is_stalled = False
        self._is_outdated = True
