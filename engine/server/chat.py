"""POST /v1/chat/completions."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import msgspec
from msgspec import UNSET
from starlette.requests import Request
from starlette.responses import Response

from triode.actors.messages import Delta, FinishReason
from triode.engine.completion import Completion, Result
from triode.engine.server.chat_reply import ChatReply
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
    Usage,
)
from triode.engine.server.parameters import chat_params, refused
from triode.engine.server.replies.reader import ReplyReader
from triode.engine.server.service import Service
from triode.engine.server.tools.plan import plan_tools
from triode.models.conversation import Conversation
from triode.models.sampling import SamplingParams

_NOTHING = ChatDelta()
_DECODER = msgspec.json.Decoder(ChatRequest)


class ChatEndpoint:
    """Replies to conversations."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def create(self, request: Request) -> Response:
        """One conversation, `n` replies."""
        body = decode(await read_body(request, self._service.config.max_body_bytes), _DECODER)
        self._service.check_model(body.model)
        replies, options = self._service.replies, body.chat_template_kwargs or {}
        plan = plan_tools(body.tools, body.tool_choice, body.parallel_tool_calls, replies.tool_format)
        params = chat_params(body, plan)
        make_reader = partial(replies.reader, plan, starts_inside=self._starts_inside(options, params))
        prompt = Conversation(tuple(body.messages), plan.for_template, options)
        dialect = ChatDialect(self._service, make_reader)
        return Generation(self._service, Job.of(body, [prompt], params, plan), dialect, request)

    def _starts_inside(self, options: Mapping[str, object], params: SamplingParams) -> bool:
        """Whether the reply begins as reasoning. A guided one does not: its guide holds from the first token."""
        try:
            return params.guide is None and self._service.replies.prompt_opens_reasoning(options)
        except ValueError as error:
            raise refused("chat_template_kwargs", str(error)) from None


class ChatDialect:
    """`chat.completion` and `chat.completion.chunk`."""

    def __init__(self, service: Service, make_reader: Callable[[], ReplyReader | None]) -> None:
        self._tokenizer = service.tokenizer
        self._head = head(service, "chat.completion.chunk", "chatcmpl")
        self._replies: defaultdict[int, ChatReply] = defaultdict(lambda: ChatReply(make_reader()))
        self.answer_id = str(self._head["id"])

    def opening(self, num_choices: int) -> Sequence[ChatChunk]:
        """Who speaks."""
        delta = ChatDelta(role="assistant", content="")
        return [self._chunk([ChatChunkChoice(index, delta)]) for index in range(num_choices)]

    def chunk(self, choice: int, delta: Delta) -> ChatChunk | None:
        """Text, its logprobs and, in the last one, why the reply ends."""
        logprobs = None if delta.logprobs is None else chat_logprobs(self._tokenizer, delta.logprobs)
        reply, reason = self._replies[choice], delta.finish_reason
        added = reply.delta(delta.text, is_last=reason is not None)
        if reason is None and logprobs is None and added == _NOTHING:
            return None
        end = None if reason is None else reply.end(reason)
        return self._chunk([ChatChunkChoice(choice, added, logprobs, end, delta.stop_reason)])

    def end(self, choice: int, reason: FinishReason) -> ChatChunk:
        """Why the reply ends."""
        reply = self._replies[choice]
        added = reply.delta("", is_last=True)
        return self._chunk([ChatChunkChoice(choice, added, finish_reason=reply.end(reason))])

    def usage(self, usage: Usage) -> ChatChunk:
        """The tokens of the whole request."""
        return msgspec.structs.replace(self._chunk([]), usage=usage)

    def answer(self, results: Sequence[Result]) -> ChatCompletion:
        """The replies."""
        (result,) = results
        scores = result.prompt_logprobs
        return ChatCompletion(
            **(self._head | {"object": "chat.completion"}),  # type: ignore[arg-type]
            choices=[self._choice(sample) for sample in result.completions],
            usage=usage_of([result.usage]),
            prompt_logprobs=UNSET if scores is None else prompt_logprobs(self._tokenizer, scores),
        )

    def _choice(self, sample: Completion) -> ChatChoice:
        reply = self._replies[sample.index]
        return ChatChoice(
            index=sample.index,
            message=reply.message(sample.text),
            logprobs=None if sample.logprobs is None else chat_logprobs(self._tokenizer, sample.logprobs),
            finish_reason=reply.end(sample.finish_reason or FinishReason.ERROR),
            stop_reason=sample.stop_reason,
            seed=sample.seed,
        )

    def _chunk(self, choices: list[ChatChunkChoice]) -> ChatChunk:
        return ChatChunk(**self._head, choices=choices)  # type: ignore[arg-type]
