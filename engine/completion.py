"""What a caller gets: the finished texts of a request, gathered from its mail."""

from collections.abc import Iterable

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
    """One sample while it grows."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.token_ids: list[TokenId] = []
        self.logprobs: list[TokenLogprobs] = []
        self.finish_reason: FinishReason | None = None
        self.stop_reason: str | int | None = None

    def add(self, delta: Delta) -> None:
        self.texts.append(delta.text)
        self.token_ids.extend(delta.token_ids)
        if delta.logprobs is not None:
            self.logprobs.extend(delta.logprobs)
        if delta.finish_reason is not None:
            self.finish_reason, self.stop_reason = delta.finish_reason, delta.stop_reason


class Reply:
    """Everything that has been read of one request. The three kinds of stream differ only in how they wait."""

    def __init__(self, request_id: RequestId) -> None:
        self.request_id = request_id
        self.opened: Opened | None = None
        self.ended: Ended | None = None
        self.embedding: tuple[float, ...] | None = None
        self.failure: Exception | None = None
        """Why the request was refused (ValueError) or failed while it ran (RequestFailed)."""
        self._samples: list[_Sample] = []
        self._prompt_logprobs: list[TokenLogprobs] = []
        self._num_unfinished = 1

    @property
    def is_complete(self) -> bool:
        """Whether no more mail will come."""
        return self._num_unfinished == 0

    def read(self, items: Iterable[Mail]) -> list[Delta]:
        """Take in mail; returns the deltas in it."""
        deltas: list[Delta] = []
        for item in items:
            match item:
                case Delta():
                    self._samples[item.index].add(item)
                    deltas.append(item)
                    self._num_unfinished -= item.finish_reason is not None
                case Opened():
                    self.opened = item
                    self._samples = [_Sample() for _ in range(item.params.n)]
                    self._num_unfinished = item.params.n
                case PromptScored():
                    self._prompt_logprobs.extend(item.logprobs)
                case Embedded():
                    self.embedding = item.embedding
                    self._num_unfinished = 0
                case Rejected():
                    self._num_unfinished = 0
                    self.failure = (EngineBusy if item.is_busy else ValueError)(item.reason)
                case Ended():
                    self._end(item)
        return deltas

    def _end(self, ended: Ended) -> None:
        self.ended = ended
        self._num_unfinished = 0
        is_failed = ended.status is RequestStatus.FAILED
        for sample in self._samples:
            sample.finish_reason = sample.finish_reason or (FinishReason.ERROR if is_failed else FinishReason.CANCELLED)
        if is_failed:
            kind = RequestUnsatisfiable if ended.is_unsatisfiable else RequestFailed
            self.failure = kind(f"request {self.request_id} failed: {ended.reason}")

    def usage(self, num_cached_tokens: int) -> Usage:
        """Tokens read so far."""
        return Usage(
            prompt_tokens=0 if self.opened is None else self.opened.num_prompt_tokens,
            completion_tokens=sum(len(sample.token_ids) for sample in self._samples),
            cached_tokens=num_cached_tokens,
        )

    def completions(self, num_cached_tokens: int) -> tuple[Completion, ...]:
        """The samples as far as they have been read."""
        if self.opened is None:
            return ()
        usage = self.usage(num_cached_tokens)
        wants_logprobs = self.opened.params.logprobs is not None
        return tuple(
            Completion(
                index=index,
                text="".join(sample.texts),
                token_ids=tuple(sample.token_ids),
                finish_reason=sample.finish_reason,
                stop_reason=sample.stop_reason,
                logprobs=tuple(sample.logprobs) if wants_logprobs else None,
                usage=usage,
                seed=self.opened.seed,
            )
            for index, sample in enumerate(self._samples)
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
