"""The text of one sequence: its tokens decoded, its stop strings watched, its tokens counted."""

from collections.abc import Sequence
from typing import NamedTuple

from triode.actors.detokenizer.incremental import IncrementalDecoder
from triode.actors.detokenizer.stops import StopMatcher


class StoppedBy(NamedTuple):
    """The stop string that ended a text, and how many tokens it took to complete it."""

    stop: str
    num_tokens: int


class SequenceText:
    """Text that may be shown, token by token.

    Args:
        decoder: a fresh one.
        stops: stop strings; with none, text is released as it is decoded.
        include_stop: whether the text keeps the stop string or stop token that ends it.
        min_tokens: a stop string is honoured only if a later token than this one, counted from 1, completes it.
    """

    def __init__(
        self, decoder: IncrementalDecoder, stops: Sequence[str] = (), *, include_stop: bool = False, min_tokens: int = 0
    ) -> None:
        self.num_tokens = 0
        """Tokens fed, the stop token included; those after a stop string do not count."""
        self.stopped: StoppedBy | None = None
        self._decoder = decoder
        self._decode = decoder.feed
        self._matcher = StopMatcher(stops, include_stop=include_stop) if stops else None
        self._include_stop = include_stop
        self._min_tokens = min_tokens

    def feed(self, token_id: int, *, is_stop_token: bool = False) -> str:
        """Add a token; returns the text that can now be shown. Tokens after a stop string are ignored."""
        if self.stopped is not None:
            return ""
        self.num_tokens += 1
        if is_stop_token and not self._include_stop:
            return ""
        text = self._decode(token_id)
        return text if self._matcher is None else self._watched(text)

    def finish(self) -> str:
        """The sequence has ended: the text still held back. A stop string may be found only now."""
        if self.stopped is not None:
            return ""
        rest = self._watched(self._decoder.finish())
        return rest + self._matcher.finish() if self._matcher is not None and self.stopped is None else rest

    def _watched(self, text: str) -> str:
        if self._matcher is None:
            return text
        released = self._matcher.feed(text, armed=self.num_tokens > self._min_tokens)
        if self._matcher.matched is not None:
            self.stopped = StoppedBy(self._matcher.matched, self.num_tokens)
        return released
