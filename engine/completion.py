"""What a caller gets: the finished texts of a request, gathered from its mail."""

from collections.abc import Iterable, Sequence

import msgspec

from triode.actors.messages import (
    Delta,
    Embedded,
    Ended,
    FinishReason,
    Mail,
    Opened,
    PromptScored,
    Rejected,
    RequestStatus,
)
from triode.actors.transcript import Transcript
from triode.errors import EngineBusy, RequestFailed, RequestUnsatisfiable
from triode.ids import RequestId, TokenId
from triode.models.step import TokenLogprobs


class Usage(msgspec.Struct, frozen=True):
    """Tokens of one request. Output ends with the stop, when one ended it."""

    prompt_tokens: int
    completion_tokens: int
    """Of all samples together, a final stop token included."""
    cached_tokens: int
    """Prompt tokens whose KV entries came from the prefix cache."""


class Completion(msgspec.Struct, frozen=True):
    """One sample of a request."""

    index: int
    text: str
    token_ids: tuple[TokenId, ...]
    finish_reason: FinishReason | None
    """None while the sample is still being generated."""
    stop_reason: str | int | None
    """The stop string or stop token that ended it."""
    logprobs: tuple[TokenLogprobs, ...] | None
    usage: Usage
    """Of the whole request."""
    seed: int
    """The seed of the draws, given or drawn at submit."""


class Result(msgspec.Struct, frozen=True):
    """A finished request."""

    request_id: RequestId
    completions: tuple[Completion, ...]
    usage: Usage
    seed: int
    max_tokens: int
    """The limit that held, given or the room that the prompt left."""
    reason: str | None
    """Why the request was cancelled, if it was."""
    prompt_logprobs: tuple[TokenLogprobs, ...] | None
    """Of the prompt's second token and those after it; the first has nothing to be predicted from."""

    @property
    def completion(self) -> Completion:
        """The only sample.

        Raises:
            ValueError: if the request asked for several.
        """
        return only(self.completions)


def only(completions: tuple[Completion, ...]) -> Completion:
    """The one completion of a request with n = 1."""
    if len(completions) != 1:
        raise ValueError(f"completion needs n = 1, got n = {len(completions)}: use completions")
    return completions[0]


class _Sample:
    """One sample as far as it has been read: a place in its transcript, which somebody else may be writing on."""

    def __init__(self, request_id: RequestId, index: int, transcript: Transcript) -> None:
        self._num_tokens = 0
        self._finish_reason: FinishReason | None = None
        self._request_id = request_id
        self._index = index
        self._transcript = transcript
        self._num_texts = 0

    def next_delta(self) -> Delta | None:
        """All that has been written since the last call; None if no token has, and no end."""
        transcript, start, first = self._transcript, self._num_tokens, self._num_texts
        # First of all: what is seen besides is then at least as new.
        end = len(transcript.token_ids)
        reason = transcript.finish_reason if end == transcript.num_final_tokens else None
        if start == end and reason is self._finish_reason:
            return None
        texts = transcript.texts[first:]
        self._num_texts, self._num_tokens, self._finish_reason = first + len(texts), end, reason
        return Delta(
            self._request_id,
            self._index,
            texts[0] if len(texts) == 1 else "".join(texts),
            (transcript.token_ids[start],) if end == start + 1 else tuple(transcript.token_ids[start:end]),
            tuple(transcript.logprobs[start:end]) if transcript.logprobs else None,
            reason,
            None if reason is None else transcript.stop_reason,
        )

    @property
    def is_written(self) -> bool:
        """Whether the transcript has its end."""
        return len(self._transcript.token_ids) == self._transcript.num_final_tokens

    def num_read(self, *, counts_all: bool) -> int:
        """Tokens read, or all that are there."""
        return len(self._transcript.token_ids) if counts_all else self._num_tokens

    def completion(self, opened: Opened, ended: FinishReason | None, usage: Usage, *, counts_all: bool) -> Completion:
        """What has been read, or all that is there; `ended` says what ended the request, if not its tokens."""
        transcript, end = self._transcript, self.num_read(counts_all=counts_all)
        if transcript.num_final_tokens is None:
            reason = ended
        else:
            reason = transcript.finish_reason if counts_all and self.is_written else self._finish_reason
        return Completion(
            index=self._index,
            text="".join(transcript.texts if counts_all else transcript.texts[: self._num_texts]),
            token_ids=tuple(transcript.token_ids[:end]),
            finish_reason=reason,
            stop_reason=None if reason is None else transcript.stop_reason,
            logprobs=None if opened.params.logprobs is None else tuple(transcript.logprobs[:end]),
            usage=usage,
            seed=opened.seed,
        )


class Reply:
    """Everything that has been read of one request. The three kinds of stream differ only in how they wait.

    Mail is taken in by `read`, and what the samples have said by `next_delta` or `deltas`.
    """

    def __init__(self, request_id: RequestId, transcripts: Sequence[Transcript]) -> None:
        """`transcripts` may grow meanwhile."""
        self.request_id = request_id
        self.opened: Opened | None = None
        self.ended: Ended | None = None
        self.embedding: tuple[float, ...] | None = None
        self.failure: Exception | None = None
        """Why the request was refused (ValueError) or failed while it ran (RequestFailed)."""
        self.counts_all = False
        """Set to count as read whatever the transcripts hold, though it was in no delta."""
        self._samples = [_Sample(request_id, index, transcript) for index, transcript in enumerate(transcripts)]
        self._turn = 0
        self._prompt_logprobs: list[TokenLogprobs] = []
        self._num_unfinished = len(self._samples)
        self.is_complete = not self._samples
        """Whether nothing will come beyond what is in the transcripts: the request was ended, or all ends have been read."""

    @property
    def is_written(self) -> bool:
        """Whether the transcripts are all that there will be, in deltas or not."""
        return self.is_complete or all(sample.is_written for sample in self._samples)

    def read(self, items: Iterable[Mail]) -> None:
        """Take in mail."""
        for item in items:
            match item:
                case Opened():
                    self.opened = item
                case PromptScored():
                    self._prompt_logprobs.extend(item.logprobs)
                case Embedded():
                    self.embedding = item.embedding
                    self.is_complete = True
                case Rejected():
                    self.is_complete = True
                    self.failure = (EngineBusy if item.is_busy else ValueError)(item.reason)
                case Ended():
                    self._end(item)

    def next_delta(self) -> Delta | None:
        """What one sample has said since it was read last; the samples take turns. None if none has said anything."""
        samples = self._samples
        for _ in samples:
            turn = self._turn
            self._turn = turn + 1 if turn + 1 < len(samples) else 0
            delta = samples[turn].next_delta()
            if delta is not None:
                if delta.finish_reason is not None:
                    self._count_ends(1)
                return delta
        return None

    def deltas(self) -> list[Delta]:
        """What all samples have said since they were read last, at most one delta a sample."""
        deltas = [delta for sample in self._samples if (delta := sample.next_delta()) is not None]
        self._count_ends(sum(delta.finish_reason is not None for delta in deltas))
        return deltas

    def _count_ends(self, num_ended: int) -> None:
        self._num_unfinished -= num_ended
        self.is_complete = self.is_complete or self._num_unfinished == 0

    def _end(self, ended: Ended) -> None:
        self.ended = ended
        self.is_complete = True
        if ended.status is RequestStatus.FAILED:
            kind = RequestUnsatisfiable if ended.is_unsatisfiable else RequestFailed
            self.failure = kind(f"request {self.request_id} failed: {ended.reason}")

    def usage(self, num_cached_tokens: int) -> Usage:
        """Tokens read so far."""
        return Usage(
            prompt_tokens=0 if self.opened is None else self.opened.num_prompt_tokens,
            completion_tokens=sum(sample.num_read(counts_all=self.counts_all) for sample in self._samples),
            cached_tokens=num_cached_tokens,
        )

    def completions(self, num_cached_tokens: int) -> tuple[Completion, ...]:
        """The samples as far as they have been read."""
        if self.opened is None:
            return ()
        usage, ended = self.usage(num_cached_tokens), None
        if self.ended is not None:
            ended = FinishReason.ERROR if self.ended.status is RequestStatus.FAILED else FinishReason.CANCELLED
        return tuple(
            [sample.completion(self.opened, ended, usage, counts_all=self.counts_all) for sample in self._samples]
        )

    def result(self, num_cached_tokens: int) -> Result:
        """The finished request."""
        opened = self.opened
        assert opened is not None, "a result is asked for after the request was accepted"
        assert opened.params.max_tokens is not None, "the tokenizer resolves max_tokens"
        wants_scores = opened.params.prompt_logprobs is not None
        return Result(
            request_id=self.request_id,
            completions=self.completions(num_cached_tokens),
            usage=self.usage(num_cached_tokens),
            seed=opened.seed,
            max_tokens=opened.params.max_tokens,
            reason=None if self.ended is None else self.ended.reason,
            prompt_logprobs=tuple(self._prompt_logprobs) if wants_scores else None,
        )


def coalesce(deltas: list[Delta]) -> list[Delta]:
    """At most one delta a sample, with the same concatenation."""
    merged: dict[int, Delta] = {}
    for delta in deltas:
        before = merged.get(delta.index)
        merged[delta.index] = delta if before is None else _join(before, delta)
    return list(merged.values())


def _join(first: Delta, second: Delta) -> Delta:
    return msgspec.structs.replace(
        second,
        text=first.text + second.text,
        token_ids=first.token_ids + second.token_ids,
        logprobs=None if second.logprobs is None else (first.logprobs or ()) + second.logprobs,
    )
