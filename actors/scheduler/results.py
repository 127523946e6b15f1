"""Reading a retired step: which tokens belong to whom, and which of them are a sequence's last."""

from typing import NamedTuple, TypeAlias

from triode.actors.messages import Embedded, FinishReason, PromptScored, RequestStatus, Sampled
from triode.actors.scheduler.launch import SAMPLING, Launch
from triode.actors.scheduler.outbox import Outbox
from triode.actors.scheduler.request import Request, Sequence
from triode.actors.scheduler.wants import Want
from triode.ids import RequestId, TokenId
from triode.models.step import Output, RowError, StepResult, TokenLogprobs

_NewToken: TypeAlias = tuple[RequestId, int, TokenId, FinishReason | None]
"""A row of Sampled."""


class Reading(NamedTuple):
    """What a retired step brought to an end."""

    ended: list[Sequence]
    stale: list[Sequence]
    """Had ended, or lost their slot, before; for some of them this may have been the last step that they were in."""
    failed: dict[Request, RowError]
    """Requests with a row that should have a token and has none, and why."""


def read_step(launch: Launch, result: StepResult, outbox: Outbox) -> Reading:
    """Append the step's tokens to their sequences and tell the detokenizer.

    A row is stale, and its tokens are dropped, when its sequence has ended or lost its slot since the launch.
    """
    reading = Reading([], [], {})
    tokens: list[_NewToken] = []
    logprobs: list[TokenLogprobs | None] = []
    first = 0
    # What else a row may bring, no row does in nearly every step.
    is_plain = result.errors is None and result.logprobs is None
    sample, decode = Output.SAMPLE, RequestStatus.DECODE
    rows = zip(launch.rows, result.slots, launch.epochs, result.num_accepted, strict=True)
    for index, (row, slot, epoch, num_accepted) in enumerate(rows):
        sequence = row.sequence
        sequence.num_in_flight -= 1
        # Epochs count within a slot: another slot may have the same.
        if sequence.slot != slot or sequence.epoch != epoch:
            reading.stale.append(sequence)
        elif is_plain and num_accepted == 1 and row.output is sample and sequence.status is decode:
            if _read_token(sequence, result.token_ids[first], tokens):
                reading.ended.append(sequence)
        else:
            _read_row(row, index, first, num_accepted, result, outbox, reading, tokens, logprobs)
        first += num_accepted
    if tokens:
        request_ids, sample_indices, token_ids, reasons = zip(*tokens, strict=True)
        scores = None if result.logprobs is None else tuple(logprobs)
        outbox.to_detokenizer(Sampled(result.step_id, request_ids, sample_indices, token_ids, reasons, scores))
    return reading


def _read_row(
    row: Want,
    index: int,
    first: int,
    num_accepted: int,
    result: StepResult,
    outbox: Outbox,
    reading: Reading,
    tokens: list[_NewToken],
    logprobs: list[TokenLogprobs | None],
) -> None:
    """Whatever a row may bring; its tokens are those from number `first` on."""
    _score_prompt(row, index, result, outbox)
    if row.output is Output.HIDDEN:
        _read_embedding(row, index, result, outbox, reading.ended)
    elif result.errors is not None and (error := result.errors[index]) is not None:
        reading.failed[row.sequence.request] = error
    elif row.output in SAMPLING:
        num_before = len(tokens)
        if _read_tokens(row.sequence, result.token_ids[first : first + num_accepted], tokens, outbox):
            reading.ended.append(row.sequence)
        if result.logprobs is not None:
            logprobs.extend(result.logprobs[first : first + len(tokens) - num_before])


def _read_token(sequence: Sequence, token_id: TokenId, tokens: list[_NewToken]) -> bool:
    """Take the only new token of a sequence that has had some before. Returns whether it is the last."""
    known, request, reason = sequence.token_ids, sequence.request, None
    known.append(token_id)
    num_tokens = len(known)
    num_pending = sequence.num_computed - num_tokens + 1
    sequence.num_pending = num_pending if num_pending > 0 else 0
    if num_tokens >= request.max_total_tokens or token_id in request.stop_token_ids:
        reason = sequence.finish_reason = finish_reason(request, token_id, num_tokens)
    tokens.append((request.request_id, sequence.sample_index, token_id, reason))
    return reason is not None


def _read_tokens(sequence: Sequence, new: tuple[TokenId, ...], tokens: list[_NewToken], outbox: Outbox) -> bool:
    """Take a row's new tokens up to the one that ends the sequence. Returns whether one did."""
    if not new:
        # The step was planned before anyone knew of the tokens that a guide forced, and computed one of them.
        return False
    request = sequence.request
    # Of the steps on their way, those that end before the last token now known bring none.
    num_known = len(sequence.token_ids) + len(new)
    sequence.num_pending = max(0, sequence.num_computed - num_known + 1)
    if sequence.status is RequestStatus.PREFILL:
        sequence.advance(RequestStatus.DECODE)
        outbox.status_of(request)
    for token_id in new:
        sequence.token_ids.append(token_id)
        reason = finish_reason(request, token_id, len(sequence.token_ids))
        tokens.append((request.request_id, sequence.sample_index, token_id, reason))
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
