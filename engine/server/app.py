"""The ASGI app: which path is answered by whom, and how what they raise is answered."""

from http import HTTPStatus

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket

from triode.engine.server.bridge import BridgeEndpoint
from triode.engine.server.chat import ChatEndpoint
from triode.engine.server.completions import CompletionEndpoint
from triode.engine.server.embeddings import EmbeddingEndpoint
from triode.engine.server.errors import RequestError
from triode.engine.server.guard import Guard, error_response, refuse
from triode.engine.server.openapi import openapi
from triode.engine.server.playground import playground
from triode.engine.server.responses.endpoint import ResponseEndpoint
from triode.engine.server.service import Service
from triode.engine.server.status import StatusEndpoints
from triode.engine.server.tokens import TokenEndpoints


def build_app(service: Service) -> Starlette:
    """The app. It needs no lifespan, so that it can be mounted anywhere."""
    responses = ResponseEndpoint(service)
    status, tokens, bridge = StatusEndpoints(service), TokenEndpoints(service), BridgeEndpoint(service)
    app = Starlette(
        routes=[
            Route("/v1/chat/completions", ChatEndpoint(service).create, methods=["POST"]),
            Route("/v1/completions", CompletionEndpoint(service).create, methods=["POST"]),
            Route("/v1/embeddings", EmbeddingEndpoint(service).create, methods=["POST"]),
            Route("/v1/responses", responses.create, methods=["POST"]),
            WebSocketRoute("/v1/responses", responses.connect),
            Route("/v1/responses/{response_id}", responses.get),
            Route("/v1/responses/{response_id}", responses.delete, methods=["DELETE"]),
            Route("/v1/responses/{response_id}/input_items", responses.input_items),
            Route("/v1/responses/{response_id}/cancel", responses.cancel, methods=["POST"]),
            WebSocketRoute("/v1/stream", bridge.connect),
            Route("/v1/stream/schema", bridge.schema),
            Route("/v1/models", status.models),
            Route("/v1/models/{name:path}", status.model),
            Route("/tokenize", tokens.tokenize, methods=["POST"]),
            Route("/detokenize", tokens.detokenize, methods=["POST"]),
            Route("/health", status.health),
            Route("/ready", status.ready),
            Route("/version", status.version),
            Route("/metrics", status.metrics),
            Route("/openapi.json", openapi),
            *([Route("/", playground)] if service.config.playground else []),
            WebSocketRoute("/{path:path}", _no_such_socket),
        ],
        middleware=_middleware(service),
        exception_handlers={
            RequestError: _on_request_error,
            HTTPException: _on_http_error,
            ClientDisconnect: _on_disconnect,
            Exception: _on_bug,
        },
    )
    app.state.gate = service.gate
    app.state.metrics = service.metrics
    return app


def _middleware(service: Service) -> list[Middleware]:
    config = service.config
    guard = Middleware(Guard, config=config, tracing=service.tracing)
    if not config.allowed_origins:
        return [guard]
    # Outside of the guard: a browser asks for permission without the key.
    return [
        Middleware(CORSMiddleware, allow_origins=config.allowed_origins, allow_methods=["*"], allow_headers=["*"]),
        guard,
    ]


async def _on_request_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    return error_response(error)


async def _on_http_error(request: Request, error: Exception) -> Response:
    """No such path, or not with this method."""
    assert isinstance(error, HTTPException)
    phrase = HTTPStatus(error.status_code).phrase.lower()
    message = f"{request.method} {request.url.path}: {phrase}"
    return error_response(RequestError(error.status_code, message, headers=error.headers))


async def _no_such_socket(socket: WebSocket) -> None:
    await refuse(RequestError(404, f"{socket.url.path}: not found"), socket.scope, socket.receive, socket.send)


async def _on_disconnect(request: Request, error: Exception) -> Response:
    """Nobody reads the answer to a request whose client left while sending it."""
    return Response(status_code=400)


async def _on_bug(request: Request, error: Exception) -> Response:
    """The server logs the error; the client learns no more than that."""
    return error_response(RequestError(500, "the server failed; its log says why", code="internal_error"))
