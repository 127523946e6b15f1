"""What probes, scrapers and clients ask about the server itself."""

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import Request
from starlette.responses import Response

import triode
from triode.engine.server.errors import RequestError, engine_error
from triode.engine.server.openai_responses import Model, ModelList
from triode.engine.server.service import Service
from triode.engine.server.tokens import json_response
from triode.errors import TriodeError


class StatusEndpoints:
    """GET endpoints."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def health(self, request: Request) -> Response:
        """200 while the engine lives, also while the server drains."""
        self._check_engine()
        return json_response({"status": "ok"})

    async def ready(self, request: Request) -> Response:
        """200 while new requests are taken. Nothing listens before the model is warm."""
        if self._service.gate.is_draining:
            raise RequestError(503, "the server is shutting down", code="shutting_down")
        self._check_engine()
        return json_response({"status": "ready"})

    async def version(self, request: Request) -> Response:
        """Triode's version."""
        return json_response({"version": triode.__version__})

    async def models(self, request: Request) -> Response:
        """The one model that is served."""
        return json_response(ModelList(data=[self._model()]))

    async def model(self, request: Request) -> Response:
        """The model, by its name."""
        self._service.check_model(request.path_params["name"])
        return json_response(self._model())

    async def metrics(self, request: Request) -> Response:
        """Prometheus' text format."""
        self._check_engine()
        return Response(self._service.metrics.exposition(), media_type=CONTENT_TYPE_LATEST)

    def _model(self) -> Model:
        report = self._service.engine.report
        return Model(
            id=self._service.model_name,
            created=self._service.created_s,
            root=report.model,
            max_model_len=report.max_context_tokens,
        )

    def _check_engine(self) -> None:
        ended_by = self._service.engine.ended_by
        if isinstance(ended_by, TriodeError):
            raise RequestError(503, str(ended_by), code=engine_error(ended_by).detail.code)
