"""OpenTelemetry spans, where they are asked for: one a request, and below it one a generation.

Names and attributes are OpenTelemetry's own for HTTP and for generative AI. A client's `traceparent` is the parent of its
request's span. Nothing of a prompt or an answer is in a span. Where spans go is told by the program's tracer provider, or
by `--otlp-endpoint`.
"""

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from starlette.datastructures import Headers

import triode
from triode.engine.completion import Result
from triode.engine.server.extra import require_extra

if TYPE_CHECKING:
    from opentelemetry.trace import Span


class Tracing:
    """Begins spans.

    Raises:
        MissingExtra: if `triode[otel]` is not installed.
    """

    def __init__(self, model_name: str) -> None:
        require_extra("otel")
        # Imported here: serving does without, unless it is asked for.
        from opentelemetry import propagate, trace

        self._extract = propagate.extract
        self._server_kind = trace.SpanKind.SERVER
        self._tracer = trace.get_tracer("triode", triode.__version__)
        self._model_name = model_name

    def request(self, method: str, path: str, request_id: str, headers: Headers) -> "AbstractContextManager[Span]":
        """A span for as long as a request takes. What is begun meanwhile is below it."""
        return self._tracer.start_as_current_span(
            method,
            context=self._extract(dict(headers.items())),
            kind=self._server_kind,
            attributes={"http.request.method": method, "url.path": path, "triode.request_id": request_id},
        )

    def generation(self) -> "GenerationSpan":
        """A span below the request's."""
        return GenerationSpan(
            self._tracer.start_span("text_completion", attributes={"gen_ai.request.model": self._model_name})
        )


class GenerationSpan:
    """What a generation's span is told."""

    def __init__(self, span: "Span") -> None:
        self._span = span

    def first_token(self) -> None:
        """Text has come."""
        self._span.add_event("first_token")

    def end(self, result: Result | None) -> None:
        """The generation is over; without a result its client left, or the engine failed it."""
        if result is not None:
            self._span.set_attribute("gen_ai.usage.input_tokens", result.usage.prompt_tokens)
            self._span.set_attribute("gen_ai.usage.output_tokens", result.usage.completion_tokens)
            self._span.set_attribute("triode.cached_tokens", result.usage.cached_tokens)
        reasons = ["cancelled"] if result is None else [str(s.finish_reason) for s in result.completions]
        self._span.set_attribute("gen_ai.response.finish_reasons", reasons)
        self._span.end()


def export_spans(endpoint: str) -> None:
    """Send this process's spans to an OTLP collector.

    Raises:
        MissingExtra: if `triode[otel]` is not installed.
    """
    require_extra("otel")
    from opentelemetry import trace
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    provider = TracerProvider(resource=Resource.create({"service.name": "triode"}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
    trace.set_tracer_provider(provider)
