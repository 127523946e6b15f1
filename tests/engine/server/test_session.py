"""A session changes hands between two sockets, at the worst moment."""

from contextlib import ExitStack
from typing import cast
from unittest.mock import Mock

import trio
import trio.testing

from triode.actors.messages import Delta
from triode.engine.server.bridge_messages import FromServer, Resumed, StreamDelta, Submit
from triode.engine.server.service import Service
from triode.engine.server.session import Session
from triode.engine.stream import RequestStream
from triode.ids import RequestId


class Stream:
    """A request that generates when it is told to."""

    def __init__(self) -> None:
        self.has_more = trio.Event()

    async def batch(self) -> list[Delta]:
        await self.has_more.wait()
        self.has_more = trio.Event()
        return [Delta(RequestId("a"), 0, "text", (), None)]


class Sent:
    """A socket's end."""

    def __init__(self, *, takes_time: bool) -> None:
        self.messages: list[FromServer] = []
        self._takes_time = takes_time

    async def __call__(self, message: FromServer) -> None:
        self.messages.append(message)
        # A socket that is lost refuses at once, without a look at what else there is to do.
        if self._takes_time:
            await trio.lowlevel.checkpoint()


def nothing() -> None:
    """Nobody waits for the id."""


async def test_a_word_that_comes_while_the_session_changes_hands_reaches_the_next_socket() -> None:
    service, stream = Mock(Service, metrics=Mock()), Stream()
    submit = Submit(id="a", prompt="x", window=4, resume_grace_s=30)
    sessions: dict[str, Session] = {}
    session = Session(service, sessions, submit, cast(RequestStream, stream), key="", admission=ExitStack())
    lost, found = Sent(takes_time=False), Sent(takes_time=True)
    async with trio.open_nursery() as nursery:

        async def generate_once_more_and_end() -> None:
            await trio.testing.wait_all_tasks_blocked()
            stream.has_more.set()
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()

        nursery.start_soon(session.serve, "a", lost, nothing, Resumed("a", "r"))
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(generate_once_more_and_end)
        # Whoever serves the lost socket is to go on, and then it is too late to cancel that.
        stream.has_more.set()
        session.rewind(0)
        await session.serve("b", found, nothing, Resumed("b", "r"))
    assert [message.seq for message in found.messages if isinstance(message, StreamDelta)] == [1, 2]
