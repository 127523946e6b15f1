"""From the tokens of a step to what its readers get: text, finish reasons, and the scheduler's word on stops."""

from typing import NamedTuple

from triode.actors.detokenizer.incremental import DecoderFactory
from triode.actors.detokenizer.sequence import SequenceText
from triode.actors.messages import Delta, FinishReason, Opened, Sampled, Stopped
from triode.ids import RequestId, TokenId
from triode.models.sampling import SamplingParams
from triode.models.step import TokenLogprobs


class _Reading(NamedTuple):
    """A request whose tokens are being read, and the texts of its unfinished samples by index."""

    params: SamplingParams
    texts: dict[int, SequenceText]


class Detokenizer:
    """Reads whole steps. Requests it does not know have ended, and their tokens are ignored."""

    def __init__(self, decoders: DecoderFactory) -> None:
        self._decoders = decoders
        self._requests: dict[RequestId, _Reading] = {}

    def __len__(self) -> int:
        return len(self._requests)

    def open(self, opened: Opened) -> None:
        """Expect tokens of a request."""
        params = opened.params
        texts = {
            index: SequenceText(
                self._decoders.start(skip_special_tokens=params.skip_special_tokens),
                params.stop,
                include_stop=params.include_stop,
                min_tokens=params.min_tokens,
            )
            for index in range(params.n)
        }
        self._requests[opened.request_id] = _Reading(params, texts)

    def forget(self, request_id: RequestId) -> None:
        """The request has ended for another reason than its tokens."""
        self._requests.pop(request_id, None)

    def read(self, sampled: Sampled) -> tuple[list[Delta], list[Stopped]]:
        """What the step's readers get, and which sequences with stop strings have a settled text."""
        deltas: list[Delta] = []
        stopped: list[Stopped] = []
        logprobs = sampled.logprobs or (None,) * len(sampled.token_ids)
        rows = zip(
            sampled.request_ids,
            sampled.sample_indices,
            sampled.token_ids,
            sampled.finish_reasons,
            logprobs,
            strict=True,
        )
        for request_id, index, token_id, reason, logprob in rows:
            reading = self._requests.get(request_id)
            if reading is None or (text := reading.texts.get(index)) is None:
                continue
            delta = _read_token(request_id, index, text, token_id, reason, logprob)
            deltas.append(delta)
            if delta.finish_reason is not None:
                if reading.params.stop:
                    stopped.append(Stopped(request_id, index, text.num_tokens))
                self._close(request_id, reading, index)
        return deltas, stopped

    def _close(self, request_id: RequestId, reading: _Reading, index: int) -> None:
        del reading.texts[index]
        if not reading.texts:
            del self._requests[request_id]


def _read_token(
    request_id: RequestId,
    index: int,
    text: SequenceText,
    token_id: TokenId,
    reason: FinishReason | None,
    logprob: TokenLogprobs | None,
) -> Delta:
    """A stop string that ends at or before the last token beats every other reason."""
    shown = text.feed(token_id, is_stop_token=reason is FinishReason.STOP)
    stop_reason: str | int | None = token_id if reason is FinishReason.STOP else None
    if reason is not None:
        shown += text.finish()
    if text.stopped is not None:
        reason, stop_reason = FinishReason.STOP, text.stopped.stop
    return Delta(
        request_id=request_id,
        index=index,
        text=shown,
        token_ids=(token_id,),
        logprobs=None if logprob is None else (logprob,),
        finish_reason=reason,
        stop_reason=stop_reason,
    )
