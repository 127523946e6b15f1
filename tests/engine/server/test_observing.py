"""What an operator sees: the log as JSON, spans, and a dashboard of metrics that exist."""

import json
import logging
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from bridge_sockets import CODECS, Socket, open_socket
from servers import ENDLESS, SERVERS, running
from triode.engine.server.logs import formatter

TEXT = "/v1/completions"
SHORT = {"prompt": "Once upon a secret", "max_tokens": 3, "ignore_eos": True}
DASHBOARD = Path(__file__).parents[3] / "docs" / "grafana.json"


def test_the_log_is_one_json_object_a_line(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), running() as server, server.client() as client:
        client.post(TEXT, json=SHORT, headers={"X-Request-Id": "mine"})
        client.get('/a"b%0Ac')
    lines = [formatter("json").format(record) for record in caplog.records if record.name == "triode.server"]
    # A line is written when its answer is out: the next request may have its line before.
    second, first = sorted(map(json.loads, lines), key=lambda entry: entry["method"])
    assert first["request_id"] == "mine"
    assert (first["method"], first["path"], first["status"]) == ("POST", TEXT, 200)
    assert (first["level"], first["logger"]) == ("info", "triode.server")
    assert first["duration_s"] > 0
    assert (second["path"], second["status"]) == ('/a"b\nc', 404)
    assert "secret" not in "".join(lines)
    assert all("\n" not in line for line in lines)


def test_an_exception_is_in_its_line() -> None:
    try:
        raise ValueError("why")
    except ValueError:
        record = logging.getLogger("x").makeRecord("x", logging.ERROR, "f", 1, "broke", (), sys.exc_info())
    entry = json.loads(formatter("json").format(record))
    assert entry["message"] == "broke"
    assert "ValueError: why" in entry["exception"]


@pytest.fixture(scope="module")
def spans() -> Iterator[InMemorySpanExporter]:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    # A process has one provider for good.
    trace.set_tracer_provider(provider)
    yield exporter
    provider.shutdown()


@pytest.mark.parametrize("kind", SERVERS)
def test_a_request_has_a_span_below_its_clients_and_a_generation_below_that(
    spans: InMemorySpanExporter, kind: str
) -> None:
    spans.clear()
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    with running(server=kind, tracing=True) as server:
        with server.client() as client:
            client.post(TEXT, json=SHORT, headers={"traceparent": parent, "X-Request-Id": "mine"})
            with client.stream("POST", TEXT, json=ENDLESS) as stream:
                next(stream.iter_bytes())
        server.wait_until_idle()
        with open_socket(server) as connection:
            socket = Socket(connection, *CODECS["triode.v1.json"])
            socket.send("submit", id="a", prompt="Once", params={"max_tokens": 2, "ignore_eos": True})
            socket.receive_kind("finished")
    found = {(span.name, index): span for index, span in enumerate(spans.get_finished_spans())}
    generations = [span for (name, _), span in found.items() if name == "text_completion"]
    requests = [span for (name, _), span in found.items() if name in ("POST", "WEBSOCKET")]
    assert (len(generations), len(requests)) == (3, 3)
    first, second, _ = generations
    assert first.attributes is not None
    assert dict(first.attributes) == {
        "gen_ai.request.model": "random:tiny",
        "gen_ai.usage.input_tokens": 4,
        "gen_ai.usage.output_tokens": 3,
        "triode.cached_tokens": 0,
        "gen_ai.response.finish_reasons": ("length",),
    }
    assert [event.name for event in first.events] == ["first_token"]
    assert second.attributes is not None
    assert second.attributes["gen_ai.response.finish_reasons"] == ("cancelled",)
    outer = next(span for span in requests if first.parent and span.context.span_id == first.parent.span_id)
    assert outer.attributes is not None
    assert (outer.attributes["triode.request_id"], outer.attributes["http.response.status_code"]) == ("mine", 200)
    assert outer.parent is not None
    assert f"{outer.parent.trace_id:032x}-{outer.parent.span_id:016x}" in parent
    assert "secret" not in " ".join(span.to_json() for span in spans.get_finished_spans())


@pytest.mark.parametrize("kind", SERVERS)
def test_every_metric_of_the_dashboard_exists(kind: str) -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    targets = [target for panel in dashboard["panels"] for target in panel.get("targets", ())]
    asked_for = {name for target in targets for name in re.findall(r"(?:vllm|triode):\w+", target["expr"])}
    assert len(asked_for) >= 15
    with running(server=kind) as server, server.client() as client:
        client.post(TEXT, json=SHORT)
        # The first look at the loop comes a moment after the start.
        while "triode:loop_lag_seconds_count{" not in (text := client.get("/metrics").text) or re.search(
            r"loop_lag_seconds_count\S* 0\.0", text
        ):
            pass
    offered = set(re.findall(r"^((?:vllm|triode):\w+)", text, re.MULTILINE))
    assert asked_for - offered == set()


def test_the_dashboards_panels_do_not_overlap() -> None:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    cells = [
        (panel["gridPos"]["x"] + dx, panel["gridPos"]["y"] + dy)
        for panel in panels
        for dx in range(panel["gridPos"]["w"])
        for dy in range(panel["gridPos"]["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24
    assert len({panel["id"] for panel in panels}) == len(panels)
