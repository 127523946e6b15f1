"""Runs one response: what the engine generates becomes events, in order, and in the end the response."""

import time
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeAlias

import msgspec

from triode.actors.messages import Delta, FinishReason
from triode.engine.completion import Result, Usage
from triode.engine.server.errors import RequestError, engine_error, wrong_value
from triode.engine.server.logprobs import chat_logprobs
from triode.engine.server.replies.pieces import Content, Piece
from triode.engine.server.responses import events
from triode.engine.server.responses.objects import (
    IncompleteDetails,
    InputDetails,
    OutputDetails,
    Response,
    ResponseUsage,
)
from triode.engine.server.responses.output import OutputWriter
from triode.engine.server.responses.prepare import Prepared, renamed
from triode.engine.server.responses.store import ResponseStore
from triode.engine.server.service import Service
from triode.engine.stream import RequestStream
from triode.errors import TriodeError

Send: TypeAlias = Callable[[Sequence[events.Event]], Awaitable[None]]


class ResponseRun:
    """One response, from submit to its last event.

    Args:
        key: of whom it is.
        store: keeps it, from its beginning on.
    """

    def __init__(self, service: Service, key: str, prepared: Prepared, store: ResponseStore) -> None:
        self._service = service
        self._key = key
        self._prepared = prepared
        self._store = store
        self._output = OutputWriter()
        self.response: Response = prepared.response
        self.failure: RequestError | None = None
        """Why it failed, if it did."""

    async def open(self, streams: list[RequestStream]) -> RequestStream:
        """Submit it.

        Raises:
            RequestError: if it is refused.
        """
        self._timing = self._service.metrics.timing()
        try:
            stream = await self._submit()
        except RequestError:
            self._timing.close(None)
            raise
        except BaseException:
            self._timing.close()
            raise
        streams.append(stream)
        return stream

    async def _submit(self) -> RequestStream:
        asked, prepared = self._prepared.asked, self._prepared
        try:
            return await self._service.engine.submit(
                prepared.prompt,
                prepared.params,
                priority=asked.priority or 0,
                cache_salt=asked.cache_salt,
                deadline_s=asked.deadline_s,
                request_id=self.response.id,
            )
        except ValueError as error:
            raise renamed(wrong_value(error, prepared.guide_field)) from None
        except TriodeError as error:
            raise engine_error(error) from error

    async def follow(self, stream: RequestStream, send: Send) -> Response:
        """Read it to its end. If this is cancelled the response is, too."""
        self._keep(self.response, stream)
        try:
            return await self._follow(stream, send)
        finally:
            self._timing.close()
            if self.response.status == "in_progress":
                self._end("cancelled", usage=None)

    async def keep_input(self, send: Send) -> Response:
        """End at once, with no output."""
        await send(self._beginning())
        self._end("completed", usage=_usage(Usage(0, 0, 0), 0))
        await send([events.Completed(sequence_number=self._output.number(), response=self.response)])
        return self.response

    async def _follow(self, stream: RequestStream, send: Send) -> Response:
        await send(self._beginning())
        try:
            while deltas := await stream.batch():
                self._timing.saw(deltas)
                if found := self._output.add(self._read(deltas[0])):
                    await send(found)
            result = await stream.result()
        except TriodeError as error:
            self._timing.close(FinishReason.ERROR)
            self.failure = renamed(engine_error(error, self._prepared.guide_field))
            self._end("failed", usage=None)
            await send([events.Failed(sequence_number=self._output.number(), response=self.response)])
            return self.response
        self._timing.ended(result)
        await send(self._finish(result))
        return self.response

    def _beginning(self) -> list[events.Event]:
        kinds: tuple[type[events.ResponseEvent], ...] = (events.Created, events.InProgress)
        return [kind(sequence_number=self._output.number(), response=self.response) for kind in kinds]

    def _read(self, delta: Delta) -> list[Piece]:
        if self._prepared.reader is not None:
            return self._prepared.reader.push(delta.text)
        scores = chat_logprobs(self._service.tokenizer, delta.logprobs or ()).content
        return [Content(delta.text, tuple(scores))] if delta.text or scores else []

    def _finish(self, result: Result) -> list[events.Event]:
        reader, reason = self._prepared.reader, result.completion.finish_reason
        found = [] if reader is None else self._output.add(reader.finish())
        is_whole = reason is FinishReason.STOP
        found += self._output.finish("completed" if is_whole else "incomplete")
        reasoning = self._service.tokenizer.encode(self._output.reasoning, add_special_tokens=False)
        usage = _usage(result.usage, len(reasoning))
        kind: type[events.ResponseEvent] = events.Completed if is_whole else events.Incomplete
        if is_whole:
            self._end("completed", usage=usage)
        else:
            self._end("incomplete" if reason is FinishReason.LENGTH else "cancelled", usage=usage)
        return [*found, kind(sequence_number=self._output.number(), response=self.response)]

    def _end(self, status: str, *, usage: ResponseUsage | None) -> None:
        self.response = msgspec.structs.replace(
            self.response,
            status=status,
            completed_at=int(time.time()) if status == "completed" else None,
            output=tuple(self._output.items),
            usage=usage,
            incomplete_details=IncompleteDetails("max_output_tokens") if status == "incomplete" else None,
            error=None if self.failure is None else self.failure.detail,
        )
        self._keep(self.response, None)

    def _keep(self, response: Response, stream: RequestStream | None) -> None:
        self._store.put(self._key, response, self._prepared.items, stream)


def _usage(usage: Usage, num_reasoning_tokens: int) -> ResponseUsage:
    return ResponseUsage(
        input_tokens=usage.prompt_tokens,
        input_tokens_details=InputDetails(usage.cached_tokens, usage.prompt_tokens - usage.cached_tokens),
        output_tokens=usage.completion_tokens,
        output_tokens_details=OutputDetails(min(num_reasoning_tokens, usage.completion_tokens)),
        total_tokens=usage.prompt_tokens + usage.completion_tokens,
    )
