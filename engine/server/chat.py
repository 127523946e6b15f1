"""POST /v1/chat/completions."""

from collections.abc import Sequence

import msgspec
from msgspec import UNSET
from starlette.requests import Request
from starlette.responses import Response

from triode.actors.messages import Delta, FinishReason
from triode.engine.completion import Result
from triode.engine.server.connection import decode, read_body
from triode.engine.server.dialect import head, usage_of
from triode.engine.server.generation import Generation, Job
from triode.engine.server.logprobs import chat_logprobs, prompt_logprobs
from triode.engine.server.openai_requests import ChatRequest
from triode.engine.server.openai_responses import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatMessage,
    Usage,
)
from triode.engine.server.parameters import chat_params
from triode.engine.server.service import Service

_DECODER = msgspec.json.Decoder(ChatRequest)


class ChatEndpoint:
    """Replies to conversations."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def create(self, request: Request) -> Response:
        """One conversation, `n` replies."""
        body = decode(await read_body(request, self._service.config.max_body_bytes), _DECODER)
        self._service.check_model(body.model)
        job = Job.of(body, [body.messages], chat_params(body))
        return Generation(self._service, job, ChatDialect(self._service), request)


class ChatDialect:
    """`chat.completion` and `chat.completion.chunk`."""

    def __init__(self, service: Service) -> None:
        self._tokenizer = service.tokenizer
        self._head = head(service, "chat.completion.chunk", "chatcmpl")
        self.answer_id = str(self._head["id"])

    def opening(self, num_choices: int) -> Sequence[ChatChunk]:
        """Who speaks."""
        delta = ChatDelta(role="assistant", content="")
        return [self._chunk([ChatChunkChoice(index, delta)]) for index in range(num_choices)]

    def chunk(self, choice: int, delta: Delta) -> ChatChunk:
        """Text, its logprobs and, in the last one, why the reply ends."""
        logprobs = None if delta.logprobs is None else chat_logprobs(self._tokenizer, delta.logprobs)
        content = ChatDelta(content=delta.text or UNSET)
        return self._chunk([ChatChunkChoice(choice, content, logprobs, delta.finish_reason, delta.stop_reason)])

    def end(self, choice: int, reason: FinishReason) -> ChatChunk:
        """Why the reply ends."""
        return self._chunk([ChatChunkChoice(choice, ChatDelta(), finish_reason=reason)])

    def usage(self, usage: Usage) -> ChatChunk:
        """The tokens of the whole request."""
        return msgspec.structs.replace(self._chunk([]), usage=usage)

    def answer(self, results: Sequence[Result]) -> ChatCompletion:
        """The replies."""
        (result,) = results
        scores = result.prompt_logprobs
        return ChatCompletion(
            **(self._head | {"object": "chat.completion"}),  # type: ignore[arg-type]
            choices=[
                ChatChoice(
                    index=sample.index,
                    message=ChatMessage(sample.text),
                    logprobs=None if sample.logprobs is None else chat_logprobs(self._tokenizer, sample.logprobs),
                    finish_reason=sample.finish_reason,
                    stop_reason=sample.stop_reason,
                    seed=sample.seed,
                )
                for sample in result.completions
            ],
            usage=usage_of([result.usage]),
            prompt_logprobs=UNSET if scores is None else prompt_logprobs(self._tokenizer, scores),
        )

    def _chunk(self, choices: list[ChatChunkChoice]) -> ChatChunk:
        return ChatChunk(**self._head, choices=choices)  # type: ignore[arg-type]
