"""From the tokens of a step to what its readers get: text, finish reasons, and the scheduler's word on stops."""

from collections.abc import Sequence
from typing import NamedTuple

from triode.actors.detokenizer.incremental import DecoderFactory
from triode.actors.detokenizer.sequence import SequenceText
from triode.actors.messages import Delta, FinishReason, Opened, Sampled, Stopped
from triode.actors.transcript import Transcript
from triode.ids import RequestId, TokenId
from triode.models.step import TokenLogprobs

# Looked up for every token otherwise.
_STOP = FinishReason.STOP


class _Sample(NamedTuple):
    """One unfinished sample, and where what it says is written down."""

    text: SequenceText
    transcript: Transcript


class _Request(NamedTuple):
    """A request whose tokens are being read, and its unfinished samples by index."""

    has_stop_strings: bool
    samples: dict[int, _Sample]


class Reading(NamedTuple):
    """What a step has brought beside the tokens that are in the transcripts now."""

    written: list[RequestId]
    """Whose transcripts have grown, a request once for each sample."""
    last: list[Delta]
    """What ends a sample. It is not written yet: a mailbox's status must tell the end before a transcript does."""
    stopped: list[Stopped]
    """Sequences with stop strings whose text is settled."""


class Detokenizer:
    """Reads whole steps. Requests it does not know have ended, and their tokens are ignored."""

    def __init__(self, decoders: DecoderFactory) -> None:
        self._decoders = decoders
        self._requests: dict[RequestId, _Request] = {}

    def __len__(self) -> int:
        return len(self._requests)

    def open(self, opened: Opened, transcripts: Sequence[Transcript]) -> None:
        """Expect tokens of a request, and write them down there; a request without transcripts has ended already."""
        params = opened.params
        samples = {
            index: _Sample(
                SequenceText(
                    self._decoders.start(skip_special_tokens=params.skip_special_tokens),
                    params.stop,
                    include_stop=params.include_stop,
                    min_tokens=params.min_tokens,
                ),
                transcript,
            )
            for index, transcript in enumerate(transcripts)
        }
        if samples:
            self._requests[opened.request_id] = _Request(bool(params.stop), samples)

    def forget(self, request_id: RequestId) -> None:
        """The request has ended for another reason than its tokens."""
        self._requests.pop(request_id, None)

    def read(self, sampled: Sampled) -> Reading:
        """Write down what the step's tokens say."""
        reading = Reading([], [], [])
        logprobs = sampled.logprobs or (None,) * len(sampled.token_ids)
        rows = zip(
            sampled.request_ids,
            sampled.sample_indices,
            sampled.token_ids,
            sampled.finish_reasons,
            logprobs,
            strict=True,
        )
        requests, written = self._requests, reading.written
        for request_id, index, token_id, reason, logprob in rows:
            request = requests.get(request_id)
            if request is None or (sample := request.samples.get(index)) is None:
                continue
            text, transcript = sample
            shown = text.feed(token_id) if reason is not _STOP else text.feed(token_id, is_stop_token=True)
            if reason is None and text.stopped is None:
                transcript.add(shown, token_id, logprob)
                written.append(request_id)
                continue
            reading.last.append(_last_delta(request_id, index, text, shown, token_id, reason, logprob))
            if request.has_stop_strings:
                reading.stopped.append(Stopped(request_id, index, text.num_tokens))
            self._close(request_id, request, index)
        return reading

    def _close(self, request_id: RequestId, request: _Request, index: int) -> None:
        del request.samples[index]
        if not request.samples:
            del self._requests[request_id]


def _last_delta(
    request_id: RequestId,
    index: int,
    text: SequenceText,
    shown: str,
    token_id: TokenId,
    reason: FinishReason | None,
    logprob: TokenLogprobs | None,
) -> Delta:
    """A stop string that ends at or before the last token beats every other reason."""
    stop_reason: str | int | None = token_id if reason is _STOP else None
    if reason is not None:
        shown += text.finish()
    if text.stopped is not None:
        reason, stop_reason = _STOP, text.stopped.stop
    return Delta(
        request_id=request_id,
        index=index,
        text=shown,
        token_ids=(token_id,),
        logprobs=None if logprob is None else (logprob,),
        finish_reason=reason,
        stop_reason=stop_reason,
    )
