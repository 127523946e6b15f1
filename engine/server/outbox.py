"""What one request has to say on a bridge, in order: sent as far as the client's window lets it, kept until acknowledged."""

from collections import deque
from typing import TypeAlias

import msgspec

from triode.engine.server.bridge_messages import Failed, Finished, StreamDelta

Word: TypeAlias = StreamDelta | Finished | Failed


class Outbox:
    """Words numbered from 1 in the order of `put`.

    With a window, at most so many are sent and unacknowledged, and those can be sent again. Without one nothing waits,
    nothing is numbered and nothing is kept.
    """

    def __init__(self, window: int | None) -> None:
        self._window = window
        self._kept: deque[Word] = deque()
        """Those numbered `_num_acknowledged + 1` and up."""
        self._num_acknowledged = 0
        self._num_sent = 0
        self._num_put = 0
        self._is_open_wide = False

    def put(self, word: Word) -> None:
        """Add a word."""
        self._num_put += 1
        self._kept.append(word if self._window is None else msgspec.structs.replace(word, seq=self._num_put))

    def next(self) -> Word | None:
        """The next word to send; None while there is none, or the window is full."""
        if not self.has_unsent or self.is_full:
            return None
        self._num_sent += 1
        if self._window is None:
            self._num_acknowledged += 1
            return self._kept.popleft()
        return self._kept[self._num_sent - self._num_acknowledged - 1]

    @property
    def has_unsent(self) -> bool:
        """Whether a word waits to be sent."""
        return self._num_sent < self._num_put

    @property
    def is_full(self) -> bool:
        """Whether nothing may be sent before the client acknowledges something."""
        is_bounded = self._window is not None and not self._is_open_wide
        return is_bounded and self._num_sent - self._num_acknowledged >= (self._window or 0)

    @property
    def is_empty(self) -> bool:
        """Whether everything has been acknowledged, or sent if nobody is to acknowledge it."""
        return not self._kept

    def acknowledge(self, seq: int) -> None:
        """The client has all words up to this one.

        Raises:
            ValueError: if it was not sent.
        """
        if not 0 <= seq <= self._num_sent:
            raise ValueError(f"seq must be >= 0 and <= {self._num_sent}, the last that was sent, got {seq}")
        while self._num_acknowledged < seq:
            self._num_acknowledged += 1
            self._kept.popleft()

    def rewind(self, seq: int) -> None:
        """Begin again after the last word that the client has.

        Raises:
            ValueError: if the words after it are not all kept.
        """
        if not self._num_acknowledged <= seq <= self._num_sent:
            raise ValueError(f"seq must be >= {self._num_acknowledged} and <= {self._num_sent}, got {seq}")
        self.acknowledge(seq)
        self._num_sent = seq

    def open_wide(self) -> None:
        """Let everything be sent: nobody waits for more of it than its end."""
        self._is_open_wide = True
