"""The answer to one generation request: its streams are opened, read and written while the client is connected.

What one step brings to one prompt is one write.
"""

from collections.abc import Awaitable, Callable, Sequence
from functools import partial

import msgspec
from starlette.requests import Request

from triode.actors.messages import FinishReason
from triode.engine.completion import Result
from triode.engine.request import Prompt
from triode.engine.server.attended import EVENT_HEADERS, Attended, write_json
from triode.engine.server.connection import Writer, together
from triode.engine.server.dialect import Dialect, usage_of
from triode.engine.server.errors import engine_error, wrong_value
from triode.engine.server.guides import guide_field
from triode.engine.server.metrics import Timing
from triode.engine.server.openai_requests import GenerationRequest
from triode.engine.server.service import Service
from triode.engine.server.tools.plan import ToolPlan
from triode.engine.stream import RequestStream
from triode.errors import TriodeError
from triode.models.sampling import SamplingParams

_ENCODER = msgspec.json.Encoder()
_DONE = b"data: [DONE]\n\n"


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """What is to be generated, checked as far as it can be without the engine."""

    prompts: list[Prompt]
    params: SamplingParams
    priority: int
    cache_salt: str | None
    deadline_s: float | None
    is_streamed: bool
    wants_usage: bool
    """As the stream's last chunk; a whole answer always has it."""
    guide_field: str | None
    """The client's name of what the guide was made of, if there is one."""

    @classmethod
    def of(
        cls, body: GenerationRequest, prompts: Sequence[Prompt], params: SamplingParams, plan: ToolPlan | None = None
    ) -> "Job":
        """The parts of a request that chat and text completions share."""
        return cls(
            prompts=list(prompts),
            params=params,
            priority=body.priority or 0,
            cache_salt=body.cache_salt,
            deadline_s=body.deadline_s,
            is_streamed=bool(body.stream),
            wants_usage=body.stream_options is not None and body.stream_options.include_usage,
            guide_field=None if params.guide is None else guide_field(body.structured_outputs, plan or ToolPlan()),
        )


class Generation(Attended):
    """Runs a job and answers in a dialect."""

    def __init__(self, service: Service, job: Job, dialect: Dialect, request: Request) -> None:
        super().__init__(service, request)
        self._job = job
        self._dialect = dialect
        self._places = range(len(job.prompts))
        self._streams: dict[int, RequestStream] = {}
        self._results: dict[int, Result] = {}
        self._timings: list[Timing] = []

    async def _answer(self, writer: Writer, streams: list[RequestStream]) -> None:
        """Open, read, write."""
        self._timings = [self._service.metrics.timing() for _ in self._places]
        try:
            await self._write(writer, streams)
        finally:
            for timing in self._timings:
                timing.close()

    async def _write(self, writer: Writer, streams: list[RequestStream]) -> None:
        try:
            await together([partial(self._open, place, streams) for place in self._places])
            if not self._job.is_streamed:
                await together([partial(self._read, place) for place in self._places])
        except TriodeError as error:
            raise engine_error(error, self._job.guide_field) from error
        if self._job.is_streamed:
            await self._stream(writer)
        else:
            await write_json(writer, self._dialect.answer([self._results[place] for place in self._places]))

    async def _open(self, place: int, streams: list[RequestStream]) -> None:
        """Submit one prompt."""
        job, answer_id = self._job, self._dialect.answer_id
        try:
            stream = await self._service.engine.submit(
                job.prompts[place],
                job.params,
                priority=job.priority,
                cache_salt=job.cache_salt,
                deadline_s=job.deadline_s,
                request_id=answer_id if len(job.prompts) == 1 else f"{answer_id}-{place}",
            )
        except ValueError as error:
            self._timings[place].close(None)
            raise wrong_value(error, job.guide_field) from None
        except TriodeError:
            self._timings[place].close(None)
            raise
        streams.append(stream)
        self._streams[place] = stream

    async def _read(
        self, place: int, write: Callable[[Sequence[msgspec.Struct]], Awaitable[None]] | None = None
    ) -> None:
        """Read one prompt's output to its end; `write` gets the chunks of each step."""
        try:
            await self._follow(place, write)
        except TriodeError:
            self._timings[place].close(FinishReason.ERROR)
            raise

    async def _follow(self, place: int, write: Callable[[Sequence[msgspec.Struct]], Awaitable[None]] | None) -> None:
        stream, first_choice = self._streams[place], place * self._job.params.n
        unfinished = set(range(self._job.params.n))
        while deltas := await stream.batch():
            self._timings[place].saw(deltas)
            unfinished -= {delta.index for delta in deltas if delta.finish_reason is not None}
            if write is not None:
                chunks = [self._dialect.chunk(first_choice + delta.index, delta) for delta in deltas]
                await write([chunk for chunk in chunks if chunk is not None])
        self._results[place] = result = await stream.result()
        self._timings[place].ended(result)
        if write is not None and unfinished:
            ends = [(index, result.completions[index].finish_reason or FinishReason.ERROR) for index in unfinished]
            await write([self._dialect.end(first_choice + index, reason) for index, reason in ends])

    async def _stream(self, writer: Writer) -> None:
        async def write(chunks: Sequence[msgspec.Struct]) -> None:
            if chunks:
                await writer.write(b"".join(map(event, chunks)))

        await writer.start(200, EVENT_HEADERS)
        try:
            await write(self._dialect.opening(len(self._places) * self._job.params.n))
            await together([partial(self._read, place, write) for place in self._places])
            if self._job.wants_usage:
                await write([self._dialect.usage(usage_of([result.usage for result in self._results.values()]))])
            await writer.write(_DONE, more=False)
        except TriodeError as error:
            # The status has been sent; the error is the stream's last event.
            await writer.write(b"data: " + engine_error(error, self._job.guide_field).encode() + b"\n\n", more=False)


def event(chunk: msgspec.Struct) -> bytes:
    """A chunk as a server-sent event."""
    return b"data: " + _ENCODER.encode(chunk) + b"\n\n"
