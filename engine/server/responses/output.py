"""OutputWriter: from the pieces of a reply to the items of a response, and the events that tell of them."""

import itertools
import secrets
from collections.abc import Iterable

import msgspec

from triode.engine.server.chat_reply import new_call_id
from triode.engine.server.openai_responses import ChatLogprob
from triode.engine.server.replies.pieces import CallArguments, CallBegun, Content, Piece, Reasoning
from triode.engine.server.responses import events
from triode.engine.server.responses.objects import (
    CallItem,
    Item,
    ItemStatus,
    MessageItem,
    OutputText,
    Part,
    ReasoningItem,
    ReasoningText,
)


class OutputWriter:
    """One response's output. At most one item is open: the last."""

    def __init__(self) -> None:
        self.items: list[Item] = []
        """Those that are whole."""
        self.reasoning = ""
        self._numbers = itertools.count()
        self._open: Item | None = None
        self._text: list[str] = []
        self._logprobs: list[ChatLogprob] = []

    def number(self) -> int:
        """The number of the next event."""
        return next(self._numbers)

    def add(self, pieces: Iterable[Piece]) -> list[events.Event]:
        """What more of the reply brings."""
        found: list[events.Event] = []
        for piece in pieces:
            if isinstance(piece, CallBegun):
                found += self._close("completed")
                found += self._begin(CallItem(id=_new_id("fc"), call_id=new_call_id(), name=piece.name))
            else:
                found += self._add_text(piece)
        return found

    def finish(self, status: ItemStatus) -> list[events.Event]:
        """The reply has ended; its last item is whole, or cut."""
        found = self._close(status)
        if not self.items and status == "completed":
            # An answer of no text is an answer.
            found += self._begin(MessageItem(id=_new_id("msg")))
            found += self._close(status)
        return found

    def _add_text(self, piece: Piece) -> list[events.Event]:
        assert not isinstance(piece, CallBegun), "a call that begins has no text"
        found: list[events.Event] = []
        if isinstance(piece, Reasoning):
            if not isinstance(self._open, ReasoningItem):
                found += [*self._close("completed"), *self._begin(ReasoningItem(id=_new_id("rs")))]
            self.reasoning += piece.text
        elif not isinstance(piece, CallArguments) and not isinstance(self._open, MessageItem):
            found += [*self._close("completed"), *self._begin(MessageItem(id=_new_id("msg")))]
        self._text.append(piece.text)
        if isinstance(piece, Content):
            self._logprobs += piece.logprobs
        return [*found, self._delta(piece)]

    @property
    def _index(self) -> int:
        return len(self.items)

    def _begin(self, item: Item) -> list[events.Event]:
        self._open, self._text, self._logprobs = item, [], []
        added = events.ItemAdded(sequence_number=self.number(), output_index=self._index, item=item)
        if (part := _part(item, "")) is None:
            return [added]
        index = self._index
        return [
            added,
            events.PartAdded(sequence_number=self.number(), item_id=item.id, output_index=index, part=part),
        ]

    def _delta(self, piece: Content | Reasoning | CallArguments) -> events.Event:
        item, number, index = self._open, self.number(), self._index
        assert item is not None, "text is added to an open item"
        if isinstance(piece, Content):
            return events.TextDelta(
                sequence_number=number,
                item_id=item.id,
                output_index=index,
                delta=piece.text,
                logprobs=piece.logprobs,
            )
        kind = events.ReasoningDelta if isinstance(piece, Reasoning) else events.ArgumentsDelta
        return kind(sequence_number=number, item_id=item.id, output_index=index, delta=piece.text)

    def _text_done(self, item: MessageItem | ReasoningItem, text: str) -> events.Event:
        number, index = self.number(), self._index
        if isinstance(item, ReasoningItem):
            return events.ReasoningDone(sequence_number=number, item_id=item.id, output_index=index, text=text)
        return events.TextDone(
            sequence_number=number, item_id=item.id, output_index=index, text=text, logprobs=tuple(self._logprobs)
        )

    def _close(self, status: ItemStatus) -> list[events.Event]:
        item, text, index = self._open, "".join(self._text), self._index
        if item is None:
            return []
        found: list[events.Event] = []
        part = _part(item, text, tuple(self._logprobs))
        whole: Item
        if isinstance(item, CallItem):
            whole = msgspec.structs.replace(item, status=status, arguments=text)
            found.append(
                events.ArgumentsDone(
                    sequence_number=self.number(), item_id=item.id, output_index=index, name=item.name, arguments=text
                )
            )
        else:
            whole = msgspec.structs.replace(item, status=status, content=(part,))
            found.append(self._text_done(item, text))
        if part is not None:
            found.append(events.PartDone(sequence_number=self.number(), item_id=item.id, output_index=index, part=part))
        found.append(events.ItemDone(sequence_number=self.number(), output_index=index, item=whole))
        self.items.append(whole)
        self._open = None
        return found


def _part(item: Item, text: str, logprobs: tuple[ChatLogprob, ...] = ()) -> Part | None:
    """What holds the item's text; None if the item itself does."""
    if isinstance(item, MessageItem):
        return OutputText(text, logprobs=logprobs)
    return ReasoningText(text) if isinstance(item, ReasoningItem) else None


def _new_id(prefix: str) -> str:
    return f"{prefix}_{secrets.token_hex(16)}"
