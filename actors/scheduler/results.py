"""Reading a retired step: which tokens belong to whom, and which of them are a sequence's last."""

from typing import NamedTuple

from triode.actors.messages import Embedded, FinishReason, PromptScored, RequestStatus, Sampled
from triode.actors.scheduler.launch import SAMPLING, Launch
from triode.actors.scheduler.outbox import Outbox
from triode.actors.scheduler.request import Request, Sequence
from triode.actors.scheduler.wants import Want
from triode.ids import RequestId, TokenId
from triode.models.step import Output, StepResult, TokenLogprobs


class _Columns:
    """The parallel fields of Sampled while they grow."""

    def __init__(self) -> None:
        self.request_ids: list[RequestId] = []
        self.sample_indices: list[int] = []
        self.token_ids: list[TokenId] = []
        self.finish_reasons: list[FinishReason | None] = []
        self.logprobs: list[TokenLogprobs | None] = []

    def message(self, result: StepResult) -> Sampled:
        return Sampled(
            step_id=result.step_id,
            request_ids=tuple(self.request_ids),
            sample_indices=tuple(self.sample_indices),
            token_ids=tuple(self.token_ids),
            finish_reasons=tuple(self.finish_reasons),
            logprobs=None if result.logprobs is None else tuple(self.logprobs),
        )


class Reading(NamedTuple):
    """What a retired step brought to an end."""

    ended: list[Sequence]
    failed: dict[Request, str]
    """Requests with a row that should have a token and has none, and why."""


def read_step(launch: Launch, result: StepResult, outbox: Outbox) -> Reading:
    """Append the step's tokens to their sequences and tell the detokenizer.

    A row is stale, and its tokens are dropped, when its sequence has ended or lost its slot since the launch.
    """
    columns = _Columns()
    reading = Reading([], {})
    first = 0
    rows = zip(launch.rows, launch.epochs, result.num_accepted, strict=True)
    for index, (row, epoch, num_accepted) in enumerate(rows):
        row.sequence.num_in_flight -= 1
        if row.sequence.slot is not None and row.sequence.epoch == epoch:
            _score_prompt(row, index, result, outbox)
            if row.output is Output.HIDDEN:
                _read_embedding(row, index, result, outbox, reading.ended)
            elif result.errors is not None and (error := result.errors[index]) is not None:
                reading.failed[row.sequence.request] = error
            elif row.output in SAMPLING and _read_tokens(row, first, num_accepted, result, columns, outbox):
                reading.ended.append(row.sequence)
        first += num_accepted
    if columns.request_ids:
        outbox.to_detokenizer(columns.message(result))
    return reading


def _read_tokens(
    row: Want, first: int, num_accepted: int, result: StepResult, columns: _Columns, outbox: Outbox
) -> bool:
    """Take the row's new tokens up to the one that ends the sequence. Returns whether one did."""
    sequence = row.sequence
    sequence.num_pending -= 1
    if sequence.status is RequestStatus.PREFILL:
        sequence.advance(RequestStatus.DECODE)
        outbox.status_of(sequence.request)
    for index in range(first, first + num_accepted):
        token_id = result.token_ids[index]
        sequence.token_ids.append(token_id)
        reason = finish_reason(sequence.request, token_id, len(sequence.token_ids))
        columns.request_ids.append(sequence.request.request_id)
        columns.sample_indices.append(sequence.sample_index)
        columns.token_ids.append(token_id)
        columns.finish_reasons.append(reason)
        columns.logprobs.append(None if result.logprobs is None else result.logprobs[index])
        if reason is not None:
            sequence.finish_reason = reason
            return True
    return False


def finish_reason(request: Request, token_id: TokenId, num_tokens: int) -> FinishReason | None:
    """Why a sequence of `num_tokens` tokens ends with `token_id`, if it does. A stop token beats the length."""
    if token_id in request.stop_token_ids:
        return FinishReason.STOP
    return FinishReason.LENGTH if num_tokens >= request.max_total_tokens else None


def _score_prompt(row: Want, index: int, result: StepResult, outbox: Outbox) -> None:
    if result.prompt_logprobs is None or row.output not in (Output.PROMPT_LOGPROBS, Output.PROMPT_LOGPROBS_AND_SAMPLE):
        return
    request = row.sequence.request
    scores = result.prompt_logprobs[index][: request.num_prompt_tokens - 1 - row.num_computed]
    request.num_scored = row.num_computed + len(scores)
    if scores:
        outbox.to_detokenizer(PromptScored(request.request_id, scores))


def _read_embedding(row: Want, index: int, result: StepResult, outbox: Outbox, ended: list[Sequence]) -> None:
    sequence = row.sequence
    if sequence.num_computed < sequence.num_prompt_tokens or sequence.num_in_flight:
        return
    assert result.embeddings is not None, "a HIDDEN row has an embedding"
    outbox.to_detokenizer(Embedded(sequence.request.request_id, result.embeddings[index]))
    ended.append(sequence)
