"""From pieces of a reply to items and events."""

from typing import Any
from unittest.mock import Mock

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from triode.engine.server.replies.pieces import CallArguments, CallBegun, Content, Piece, Reasoning, merged
from triode.engine.server.responses.events import Event
from triode.engine.server.responses.output import OutputWriter
from triode.engine.server.responses.store import ResponseStore
from triode.engine.stream import RequestStream


def dicts(found: list[Event]) -> list[dict[str, Any]]:
    return [msgspec.to_builtins(event) for event in found]


texts = st.text("ab", min_size=1, max_size=3)
calls = st.tuples(st.just(CallBegun("f")), texts.map(CallArguments))
pieces = st.lists(st.tuples(texts.map(Reasoning)) | st.tuples(texts.map(Content)) | calls, max_size=6).map(
    lambda found: [piece for group in found for piece in group]
)


@settings(max_examples=50)
@given(said=pieces, is_whole=st.booleans())
def test_events_rebuild_the_items(said: list[Piece], is_whole: bool) -> None:
    writer = OutputWriter()
    found = dicts([event for piece in said for event in writer.add([piece])])
    found += dicts(writer.finish("completed" if is_whole else "incomplete"))
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    rebuilt: list[dict[str, Any]] = []
    grown = ""
    for event in found:
        kind = event["type"].removeprefix("response.")
        assert event["output_index"] == len(rebuilt)
        if kind == "output_item.added":
            assert event["item"]["status"] == "in_progress"
            grown = ""
        elif kind.endswith(".delta"):
            grown += event["delta"]
        elif kind.endswith("output_text.done") or kind == "reasoning_text.done":
            assert event["text"] == grown
        elif kind == "function_call_arguments.done":
            assert event["arguments"] == grown
        elif kind == "output_item.done":
            rebuilt.append(event["item"])
    assert rebuilt == [msgspec.to_builtins(item) for item in writer.items]
    assert {item["status"] for item in rebuilt[:-1]} <= {"completed"}
    if rebuilt:
        assert rebuilt[-1]["status"] == ("completed" if is_whole else "incomplete")
    shown = [item.get("arguments") or "".join(part["text"] for part in item["content"]) for item in rebuilt]
    wanted = [piece.text for piece in merged(said) if not isinstance(piece, CallBegun)]
    assert shown == (wanted or [""] * is_whole)


def test_an_answer_of_no_text_is_a_message() -> None:
    writer = OutputWriter()
    kinds = [event["type"] for event in dicts(writer.finish("completed"))]
    assert kinds == [
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
    ]
    assert OutputWriter().finish("incomplete") == []


def test_the_longest_unused_response_is_forgotten_first(a_response: Any) -> None:
    store = ResponseStore(2)
    for name in "ab":
        store.put("key", a_response(name), ())
    assert store.get("key", "a") is not None
    assert store.get("other", "a") is None
    store.put("key", a_response("c"), ())
    assert store.get("key", "b") is None
    assert store.get("key", "a") is not None
    store.delete("key", "a")
    assert store.get("key", "a") is None


def test_what_is_stored_is_bounded_in_bytes(a_response: Any) -> None:
    size = len(msgspec.json.encode((a_response("a"), ({"x": "y" * 100},))))
    store = ResponseStore(100, max_bytes=2 * size)
    for name in "abc":
        store.put("key", a_response(name), ({"x": "y" * 100},))
    assert [store.get("key", name) is not None for name in "abc"] == [False, True, True]
    store.put("key", a_response("b"), ())
    assert store.get("key", "c") is not None


def test_a_response_that_was_deleted_while_it_ran_is_not_kept_at_its_end(a_response: Any) -> None:
    store, stream = ResponseStore(2), Mock(RequestStream)
    store.put("key", a_response("a"), (), stream)
    store.delete("key", "a")
    store.put("key", a_response("a"), ())
    assert store.get("key", "a") is None
    # One that was only forgotten for others is.
    store.put("key", a_response("b"), (), stream)
    for name in "cd":
        store.put("key", a_response(name), ())
    store.put("key", a_response("b"), ())
    assert store.get("key", "b") is not None
