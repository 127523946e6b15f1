"""POST /tokenize and /detokenize: the model's tokens, as the engine would see them."""

from collections.abc import Callable
from functools import partial

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from triode.engine.server.connection import decode, read_body
from triode.engine.server.errors import RequestError, wrong_value
from triode.engine.server.guard import caller_of
from triode.engine.server.logprobs import token_text
from triode.engine.server.openai_requests import DetokenizeRequest, TokenizeRequest
from triode.engine.server.openai_responses import Text, Tokens
from triode.engine.server.service import Service
from triode.engine.server.tools.plan import plan_tools
from triode.ids import TokenId
from triode.models.conversation import Conversation

_TOKENIZE = msgspec.json.Decoder(TokenizeRequest)
_DETOKENIZE = msgspec.json.Decoder(DetokenizeRequest)


class TokenEndpoints:
    """Text to tokens and back."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def tokenize(self, request: Request) -> Response:
        """A text's tokens, or a conversation's."""
        return await self._answer(request, self._tokenize)

    async def detokenize(self, request: Request) -> Response:
        """The text of tokens."""
        return await self._answer(request, self._detokenize)

    async def _answer(self, request: Request, call: Callable[[bytes], Response]) -> Response:
        body = await read_body(request, self._service.config.max_body_bytes)
        # A request as every other: it counts against its key, and ends with the server's service.
        with self._service.gate.admitted(caller_of(request.scope).key):
            return await self._service.apart(len(body), partial(call, body))

    def _tokenize(self, body: bytes) -> Response:
        asked = decode(body, _TOKENIZE)
        self._service.check_model(asked.model)
        text, adds_special = self._text(asked)
        tokenizer = self._service.tokenizer
        token_ids = tokenizer.encode(text, add_special_tokens=adds_special)
        texts = (
            [token_text(tokenizer, TokenId(token_id)) for token_id in token_ids] if asked.return_token_strs else None
        )
        limit = self._service.engine.report.max_context_tokens
        return json_response(Tokens(count=len(token_ids), max_model_len=limit, tokens=token_ids, token_strs=texts))

    def _text(self, asked: TokenizeRequest) -> tuple[str, bool]:
        """What to encode, and whether with special tokens."""
        if (asked.prompt is None) == (asked.messages is None):
            raise RequestError(400, "prompt or messages must be given, and not both", param="prompt")
        if asked.prompt is not None:
            return asked.prompt, asked.add_special_tokens is not False
        plan = plan_tools(asked.tools, None, None, self._service.replies.tool_format)
        chat = Conversation(tuple(asked.messages or ()), plan.for_template, asked.chat_template_kwargs or {})
        template = self._service.tokenizer.apply_chat_template
        try:
            text = template(chat, add_generation_prompt=asked.add_generation_prompt)
        except ValueError as error:
            raise wrong_value(error) from None
        return text, asked.add_special_tokens is True

    def _detokenize(self, body: bytes) -> Response:
        asked = decode(body, _DETOKENIZE)
        self._service.check_model(asked.model)
        size = self._service.tokenizer.vocab_size
        if wrong := [token_id for token_id in asked.tokens if not 0 <= token_id < size]:
            raise RequestError(400, f"tokens must hold token ids >= 0 and < {size}, got {wrong[0]}", param="tokens")
        return json_response(Text(self._service.tokenizer.decode(asked.tokens, skip_special_tokens=False)))


def json_response(body: msgspec.Struct | dict[str, str], status: int = 200) -> Response:
    """A struct as a response."""
    return Response(msgspec.json.encode(body), status, media_type="application/json")
