"""/openapi.json says the truth: it has every route, and what is served is what it says (schemathesis)."""

import json
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import CHECKS, load_all_checks
from starlette.routing import Route

from model_files import write_tiny_gguf
from scripted_models import HERMES, SETTINGS, saying
from servers import Running, running
from triode.engine.server.app import build_app
from triode.engine.server.config import ServerConfig
from triode.engine.server.openapi import OPERATIONS
from triode.engine.server.service import Service

NOT_CHECKED = {
    # A value of the right type may still be outside its limits, or contradict another.
    "positive_data_acceptance",
    # Responses are made by POST and fetched by GET, but by ids that nothing else accepts.
    "ensure_resource_availability",
    "use_after_free",
    # No key is asked for.
    "ignored_auth",
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    path = tmp_path_factory.mktemp("tiny") / "model.gguf"
    changes: dict[str, Any] = {"tokenizer.chat_template": HERMES}
    # A context of 128 tokens: no request takes long.
    with running(str(write_tiny_gguf(path, "llama", **changes)), SETTINGS, served_name="tiny") as server:
        yield server


@pytest.fixture(scope="module")
def document(server: Running) -> dict[str, Any]:
    with server.client() as client:
        found: dict[str, Any] = client.get("/openapi.json").json()
    return found


def test_the_document_has_every_route(server: Running, document: dict[str, Any]) -> None:
    described = {(method.upper(), path) for path, methods in document["paths"].items() for method in methods}
    served = {
        (method, route.path.replace(":path", ""))
        for route in build_app(Service(server.engine, ServerConfig())).routes
        if isinstance(route, Route)
        for method in (route.methods or set()) - {"HEAD"}
    }
    assert described == served
    assert {(operation.method.upper(), operation.path) for operation in OPERATIONS} == served


def test_fields_are_described_as_their_structs_do(document: dict[str, Any]) -> None:
    schemas = document["components"]["schemas"]
    assert schemas["ChatRequest"]["properties"]["user"]["description"] == "Accepted; changes nothing."
    assert schemas["ResponseRequest"]["properties"]["store"]["description"].startswith("Whether the response can be")
    assert schemas["ChatRequest"]["properties"]["deadline_s"]["description"].startswith("Cancels the request")


def test_events_are_as_the_document_says(server: Running, document: dict[str, Any]) -> None:
    bodies: dict[str, dict[str, Any]] = {
        "/v1/chat/completions": {
            "messages": [{"role": "user", "content": "Hi"}],
            "stream_options": {"include_usage": True},
        },
        "/v1/completions": {"prompt": "Hi", "logprobs": 1},
        "/v1/responses": {"input": "Hi"},
    }
    with server.client() as client:
        for path, body in bodies.items():
            answers = document["paths"][path]["post"]["responses"]["200"]["content"]
            schema = {**answers["text/event-stream"]["itemSchema"], "components": document["components"]}
            text = client.post(path, json={**body, "stream": True, **saying("Yes.")}).text
            data = [line.removeprefix("data: ") for line in text.split("\n") if line.startswith("data: {")]
            assert len(data) >= 2
            validator = jsonschema.Draft202012Validator(schema)
            for event in data:
                validator.validate(json.loads(event))


load_all_checks()
CHECKED = [check for check in CHECKS.get_all() if check.__name__ not in NOT_CHECKED]


def check_all(server: Running, document: dict[str, Any], max_examples: int, *paths: str) -> None:
    """Of all paths, or of these."""
    quiet = settings(
        max_examples=max_examples,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    schema = schemathesis.openapi.from_dict(document)
    schema.config.update(base_url=server.url)
    for path, method in [(one.path, one.method) for one in OPERATIONS if not paths or one.path in paths]:
        operation = schema[path][method]
        modes = [GenerationMode.POSITIVE] + [GenerationMode.NEGATIVE] * (method == "post")
        cases = st.one_of(*(operation.as_strategy(generation_mode=mode) for mode in modes))

        @quiet
        @given(case=cases)
        def is_as_described(case: Any) -> None:
            case.call_and_validate(checks=CHECKED, timeout=30)

        is_as_described()
    server.wait_until_idle()


def test_what_is_served_is_what_the_document_says(server: Running, document: dict[str, Any]) -> None:
    check_all(server, document, 2, "/tokenize", "/v1/embeddings", "/v1/responses/{response_id}", "/v1/models/{name}")


@pytest.mark.slow
def test_what_is_served_is_what_the_document_says_thoroughly(server: Running, document: dict[str, Any]) -> None:
    check_all(server, document, 150)
