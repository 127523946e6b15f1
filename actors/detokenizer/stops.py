"""Stop strings: how much text is safe to release.

A stop string may begin in one token and end many tokens later, so text that could still become one is held back: the
longest end of the text that is a proper beginning of a stop string. Any match must start within the held text, hence
nothing else is remembered.

The match that ends first wins; of those that end together, the one that starts first. The text alone decides this, not
how it was cut into tokens.
"""

from collections.abc import Sequence


class StopMatcher:
    """Watches one text for stop strings.

    Args:
        stops: non-empty strings, at least one.
        include_stop: whether the stop string itself is released.
    """

    def __init__(self, stops: Sequence[str], *, include_stop: bool) -> None:
        self.matched: str | None = None
        """The stop string that ended the text."""
        self._stops = tuple(sorted(stops, key=len, reverse=True))
        self._first_characters = frozenset(stop[0] for stop in stops)
        self._include_stop = include_stop
        self._held = ""

    def feed(self, text: str, *, armed: bool = True) -> str:
        """Add text; returns what is safe to release. Text after a match is dropped.

        Unarmed, stop strings that end within this text are not honoured; one may still begin in it.
        """
        if self.matched is not None or not text:
            return ""
        if not self._held and self._first_characters.isdisjoint(text):
            return text
        num_held = len(self._held)
        text = self._held + text
        if armed and (match := self._first_match(text, num_held)) is not None:
            start, stop = match
            self.matched, self._held = stop, ""
            return text[: start + len(stop) if self._include_stop else start]
        keep_from = self._possible_start(text)
        self._held = text[keep_from:]
        return text[:keep_from]

    def finish(self) -> str:
        """The text still held: no stop string can end in it any more."""
        held, self._held = self._held, ""
        return held

    def _first_match(self, text: str, num_held: int) -> tuple[int, str] | None:
        """Start and string of the match that ends first. One that ends within the held text was not armed."""
        best: tuple[int, str] | None = None
        end_of_best = len(text) + 1
        # Longest first, so that of matches with one end the first found starts first.
        for stop in self._stops:
            start = text.find(stop, max(0, num_held + 1 - len(stop)), end_of_best - 1 if best else len(text))
            if start >= 0:
                best, end_of_best = (start, stop), start + len(stop)
        return best

    def _possible_start(self, text: str) -> int:
        """Where the longest end of `text` that is a proper beginning of a stop string starts."""
        for start in range(max(0, len(text) + 1 - len(self._stops[0])), len(text)):
            if text[start] in self._first_characters:
                end = text[start:]
                if any(len(end) < len(stop) and stop.startswith(end) for stop in self._stops):
                    return start
        return len(text)
