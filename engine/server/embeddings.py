"""POST /v1/embeddings."""

import base64
import math
import struct
from collections.abc import Sequence

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from triode.engine.server.attended import Attended, write_json
from triode.engine.server.completions import split_prompts
from triode.engine.server.connection import Writer, decode, read_body
from triode.engine.server.errors import RequestError, engine_error, wrong_value
from triode.engine.server.openai_requests import EmbeddingRequest
from triode.engine.server.openai_responses import Embedding, EmbeddingList, EmbeddingUsage
from triode.engine.server.service import Service
from triode.engine.stream import RequestStream
from triode.errors import EngineBusy, TriodeError

_DECODER = msgspec.json.Decoder(EmbeddingRequest)


class EmbeddingEndpoint:
    """Texts to vectors."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def create(self, request: Request) -> Response:
        """One input or several."""
        body = decode(await read_body(request, self._service.config.max_body_bytes), _DECODER)
        self._service.check_model(body.model)
        return Embeddings(self._service, body, request)


class Embeddings(Attended):
    """The vectors of one request, in the order of its inputs."""

    def __init__(self, service: Service, asked: EmbeddingRequest, request: Request) -> None:
        super().__init__(service, request)
        self._asked = asked
        self._prompts = split_prompts("input", asked.input, service.config.max_prompts)

    async def _answer(self, writer: Writer, streams: list[RequestStream]) -> None:
        engine, asked = self._service.engine, self._asked
        try:
            # Encoded here, because the engine's answer does not say how many tokens there were.
            prompts = [await engine.encode(prompt) for prompt in self._prompts]
            if engine.is_full:
                # `embed` would wait. A server says that it has too much to do.
                raise EngineBusy("unfinished requests must be fewer than max_queued; try again later")
            vectors = await engine.embed(prompts, pooling=asked.pooling or "mean")
        except ValueError as error:
            raise _of_input(wrong_value(error)) from None
        except TriodeError as error:
            raise engine_error(error) from error
        check_dimensions(asked.dimensions, len(vectors[0]))
        num_tokens = sum(map(len, prompts))
        self._service.metrics.prompt_tokens.inc(num_tokens)
        self._service.gate.spend_tokens(self._key, num_tokens)
        data = [Embedding(index=index, embedding=written(vector, asked)) for index, vector in enumerate(vectors)]
        usage = EmbeddingUsage(num_tokens, num_tokens)
        await write_json(writer, EmbeddingList(data=data, model=self._service.model_name, usage=usage))


def check_dimensions(asked: int | None, size: int) -> None:
    """Refuse another size than the model's.

    Raises:
        RequestError: 400.
    """
    if asked not in (None, size):
        raise RequestError(400, f"dimensions must be {size}, the size of the model's vectors", param="dimensions")


def written(vector: Sequence[float], asked: EmbeddingRequest) -> list[float] | str:
    """A vector as the client wants it."""
    if asked.normalize and (length := math.hypot(*vector)) > 0:
        vector = [value / length for value in vector]
    if asked.encoding_format == "base64":
        return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
    return list(vector)


def _of_input(error: RequestError) -> RequestError:
    """The engine calls it a prompt."""
    param = "input" if error.detail.param == "prompt" else error.detail.param
    return RequestError(error.status, str(error), param=param)
