"""The events of a streamed response, named and shaped as in OpenAI's SDK. They are numbered from 0."""

import msgspec

from triode.engine.server.openai_responses import ChatLogprob
from triode.engine.server.responses.objects import Item, Part, Response


class Event(msgspec.Struct, frozen=True, kw_only=True, tag_field="type"):
    """Base of all events."""

    sequence_number: int

    @classmethod
    def kind(cls) -> str:
        """The event's name."""
        return str(cls.__struct_config__.tag)


class ResponseEvent(Event, frozen=True, kw_only=True):
    """Base of those that bring the whole response."""

    response: Response


class Created(ResponseEvent, frozen=True, kw_only=True, tag="response.created"):
    """The request is valid and queued."""


class InProgress(ResponseEvent, frozen=True, kw_only=True, tag="response.in_progress"):
    """It is worked on."""


class Completed(ResponseEvent, frozen=True, kw_only=True, tag="response.completed"):
    """The response is whole."""


class Incomplete(ResponseEvent, frozen=True, kw_only=True, tag="response.incomplete"):
    """The response is cut: by its limit, or with status "cancelled" by somebody."""


class Failed(ResponseEvent, frozen=True, kw_only=True, tag="response.failed"):
    """The engine could not go on."""


class ItemAdded(Event, frozen=True, kw_only=True, tag="response.output_item.added"):
    """An item begins."""

    output_index: int
    item: Item


class ItemDone(Event, frozen=True, kw_only=True, tag="response.output_item.done"):
    """An item is whole."""

    output_index: int
    item: Item


class OfItem(Event, frozen=True, kw_only=True):
    """Base of those about one item."""

    item_id: str
    output_index: int


class OfPart(OfItem, frozen=True, kw_only=True):
    """Base of those about one part of an item."""

    content_index: int = 0


class PartAdded(OfPart, frozen=True, kw_only=True, tag="response.content_part.added"):
    """A part begins."""

    part: Part


class PartDone(OfPart, frozen=True, kw_only=True, tag="response.content_part.done"):
    """A part is whole."""

    part: Part


class TextDelta(OfPart, frozen=True, kw_only=True, tag="response.output_text.delta"):
    """More of the answer."""

    delta: str
    logprobs: tuple[ChatLogprob, ...] = ()


class TextDone(OfPart, frozen=True, kw_only=True, tag="response.output_text.done"):
    """The whole answer."""

    text: str
    logprobs: tuple[ChatLogprob, ...] = ()


class ReasoningDelta(OfPart, frozen=True, kw_only=True, tag="response.reasoning_text.delta"):
    """More of the reasoning."""

    delta: str


class ReasoningDone(OfPart, frozen=True, kw_only=True, tag="response.reasoning_text.done"):
    """The whole reasoning."""

    text: str


class ArgumentsDelta(OfItem, frozen=True, kw_only=True, tag="response.function_call_arguments.delta"):
    """More of a call's arguments."""

    delta: str


class ArgumentsDone(OfItem, frozen=True, kw_only=True, tag="response.function_call_arguments.done"):
    """A call's whole arguments."""

    name: str
    arguments: str
