"""/openapi.json: every route and the structs that travel on it, which are the ones that decode and encode them."""

from collections.abc import Iterable, Mapping
from functools import cache
from typing import NamedTuple

import msgspec
import msgspec.inspect
from starlette.requests import Request
from starlette.responses import Response

import triode
from triode.engine.field_docs import field_docs
from triode.engine.server.errors import ErrorBody
from triode.engine.server.openai_requests import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    TokenizeRequest,
)
from triode.engine.server.openai_responses import (
    ChatChunk,
    ChatCompletion,
    EmbeddingList,
    Model,
    ModelList,
    Text,
    TextChunk,
    TextCompletion,
    Tokens,
)
from triode.engine.server.responses import events
from triode.engine.server.responses.objects import DeletedResponse, InputItems
from triode.engine.server.responses.objects import Response as ResponseObject
from triode.engine.server.responses.requests import ResponseRequest

Json = dict[str, object]

_EVENTS = (
    events.Created | events.InProgress | events.Completed | events.Incomplete | events.Failed
    | events.ItemAdded | events.ItemDone | events.PartAdded | events.PartDone
    | events.TextDelta | events.TextDone | events.ReasoningDelta | events.ReasoningDone
    | events.ArgumentsDelta | events.ArgumentsDone
)  # fmt: skip


class State(msgspec.Struct, frozen=True):
    """What /health and /ready answer."""

    status: str


class Version(msgspec.Struct, frozen=True):
    """What /version answers."""

    version: str


class Operation(NamedTuple):
    """One method of one path."""

    method: str
    path: str
    summary: str
    request: object = None
    """The struct of the body; None without one."""
    answer: object = None
    """The struct of the answer; None if it is no JSON of ours."""
    event: object = None
    """The struct of an event, where an answer may be streamed."""
    errors: tuple[int, ...] = ()
    """Beside those that every route may have."""
    media_type: str = "application/json"


_OF_A_BODY = (400, 404, 408, 413, 415, 429, 500, 503)
_STORED = (400, 404)

OPERATIONS = (
    Operation(
        "post", "/v1/chat/completions", "Reply to a conversation.", ChatRequest, ChatCompletion, ChatChunk, _OF_A_BODY
    ),
    Operation("post", "/v1/completions", "Continue texts.", CompletionRequest, TextCompletion, TextChunk, _OF_A_BODY),
    Operation("post", "/v1/embeddings", "Make vectors of texts.", EmbeddingRequest, EmbeddingList, None, _OF_A_BODY),
    Operation("post", "/v1/responses", "Respond to items.", ResponseRequest, ResponseObject, _EVENTS, _OF_A_BODY),
    Operation("get", "/v1/responses/{response_id}", "Fetch a stored response.", None, ResponseObject, None, _STORED),
    Operation(
        "delete", "/v1/responses/{response_id}", "Forget a stored response.", None, DeletedResponse, None, _STORED
    ),
    Operation("post", "/v1/responses/{response_id}/cancel", "End a response.", None, ResponseObject, None, _STORED),
    Operation("get", "/v1/responses/{response_id}/input_items", "What it answers.", None, InputItems, None, _STORED),
    Operation("get", "/v1/models", "The model that is served.", None, ModelList),
    Operation("get", "/v1/models/{name}", "The model, by its name.", None, Model, None, (404,)),
    Operation("get", "/v1/stream/schema", "The messages of the WebSocket /v1/stream.", None, Json),
    Operation("post", "/tokenize", "Text to tokens.", TokenizeRequest, Tokens, None, _OF_A_BODY),
    Operation("post", "/detokenize", "Tokens to text.", DetokenizeRequest, Text, None, _OF_A_BODY),
    Operation("get", "/health", "Whether the engine lives.", None, State, None, (503,)),
    Operation("get", "/ready", "Whether requests are taken.", None, State, None, (503,)),
    Operation("get", "/version", "Triode's version.", None, Version),
    Operation("get", "/metrics", "Prometheus metrics.", errors=(503,), media_type="text/plain"),
    Operation("get", "/openapi.json", "This document.", None, Json),
    Operation("get", "/", "A page to try the model on.", media_type="text/html"),
)


async def openapi(request: Request) -> Response:
    """The document."""
    return Response(_document(), media_type="application/json")


@cache
def _document() -> bytes:
    kinds = {kind: None for one in OPERATIONS for kind in (one.request, one.answer, one.event) if kind is not None}
    schemas, components = msgspec.json.schema_components(
        [ErrorBody, *kinds], schema_hook=_any_value, ref_template="#/components/schemas/{name}"
    )
    for kind in _structs(msgspec.inspect.multi_type_info([ErrorBody, *kinds])):
        _describe(components, kind)
    error, *others = schemas
    schema_of = dict(zip(kinds, others, strict=True))
    paths: dict[str, Json] = {}
    for operation in OPERATIONS:
        paths.setdefault(operation.path, {})[operation.method] = _described(operation, schema_of, error)
    return msgspec.json.encode(
        {
            "openapi": "3.1.0",
            "info": {"title": "Triode", "version": triode.__version__, "description": _DESCRIPTION},
            "paths": paths,
            "components": {
                "schemas": components,
                "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
            },
            "security": [{}, {"key": []}],
        }
    )


_DESCRIPTION = (
    "OpenAI's API, served by Triode. /v1/responses is a WebSocket, too, whose messages are the request with type "
    "response.create and these events; /v1/stream is a WebSocket with a schema of its own."
)


def _structs(types: Iterable[msgspec.inspect.Type]) -> set[type[msgspec.Struct]]:
    """All structs in these types."""
    found: set[type[msgspec.Struct]] = set()
    left = list(types)
    while left:
        match left.pop():
            case msgspec.inspect.StructType(cls=struct, fields=fields) if struct not in found:
                found.add(struct)
                left += [field.type for field in fields]
            case msgspec.inspect.UnionType(types=members):
                left += members
            case msgspec.inspect.Metadata(type=inner) | msgspec.inspect.ListType(item_type=inner):
                left.append(inner)
            case msgspec.inspect.VarTupleType(item_type=inner) | msgspec.inspect.DictType(value_type=inner):
                left.append(inner)
    return found


def _describe(components: Mapping[str, Json], struct: type[msgspec.Struct]) -> None:
    """Tell of each field what the docstring below it says."""
    component = components.get(struct.__name__) or components[f"{struct.__module__}.{struct.__qualname__}"]
    properties = component["properties"]
    assert isinstance(properties, dict), "a struct is an object"
    for base in reversed(struct.__mro__):
        if issubclass(base, msgspec.Struct) and base is not msgspec.Struct:
            for name, doc in field_docs(base).items():
                # A reference may not have a description beside it in every reader's eyes, so it stays alone.
                if name in properties and "$ref" not in properties[name]:
                    properties[name]["description"] = doc


def _any_value(kind: type) -> Json:
    """The only type that msgspec does not know is `object`."""
    return {"description": "any value"}


def _described(operation: Operation, schema_of: Mapping[object, Json], error: Json) -> Json:
    found: Json = {"summary": operation.summary, "operationId": _name(operation)}
    if "{" in operation.path:
        name = operation.path.partition("{")[2].partition("}")[0]
        found["parameters"] = [{"name": name, "in": "path", "required": True, "schema": {"type": "string"}}]
    if operation.request is not None:
        body: Json = {"application/json": {"schema": schema_of[operation.request]}}
        found["requestBody"] = {"required": True, "content": body}
    content: Json = {operation.media_type: {} if operation.answer is None else {"schema": schema_of[operation.answer]}}
    if operation.event is not None:
        # Each event's data is one of these.
        content["text/event-stream"] = {"itemSchema": schema_of[operation.event]}
    refused = {"description": "An error in OpenAI's shape.", "content": {"application/json": {"schema": error}}}
    found["responses"] = {
        "200": {"description": operation.summary, "content": content},
        **{str(status): refused for status in (401, *operation.errors)},
    }
    return found


def _name(operation: Operation) -> str:
    words = operation.path.replace("{", "").replace("}", "").replace("/", " ").replace(".", " ").split()
    return "_".join([operation.method, *(word for word in words if word != "v1")])
