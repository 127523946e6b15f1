"""docs/api.md says what becomes of each field, and it is so."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai.types import completion_create_params, embedding_create_params
from openai.types.chat import completion_create_params as chat_create_params
from openai.types.responses import response_create_params

from scripted_models import HERMES, SETTINGS, write_model
from servers import Running, running
from triode.engine.server.openapi import OPERATIONS

PAGE = (Path(__file__).parents[3] / "docs/api.md").read_text(encoding="utf-8")
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1},
    "/v1/completions": {"prompt": "Hi", "max_tokens": 1},
    "/v1/responses": {"input": "Hi", "max_output_tokens": 1},
    "/v1/embeddings": {"input": "Hi"},
    "/tokenize": {"prompt": "Hi"},
    "/detokenize": {"tokens": [70]},
}
OPENAIS: dict[str, Any] = {
    "/v1/chat/completions": chat_create_params.CompletionCreateParamsNonStreaming,
    "/v1/completions": completion_create_params.CompletionCreateParamsNonStreaming,
    "/v1/responses": response_create_params.ResponseCreateParamsNonStreaming,
    "/v1/embeddings": embedding_create_params.EmbeddingCreateParams,
}
STRUCTS: dict[str, Any] = {operation.path: operation.request for operation in OPERATIONS if operation.request}
ONE_VALUE: dict[str, tuple[object, object]] = {
    "modalities": (["text"], ["audio"]),
    "best_of": (1, 2),
    "suffix": ("", "x"),
    "background": (False, True),
    "truncation": ("disabled", "auto"),
    "dimensions": (64, 32),
}
"""What is accepted and what is not, by name."""


def fields(path: str, kind: str) -> set[str]:
    """Of one list of the page."""
    section = PAGE.partition(f"## POST {path}\n")[2].partition("\n## ")[0]
    found = re.search(rf"^\* {kind}:((?:.|\n  )*)", section, re.MULTILINE)
    # What is in brackets tells of values.
    return set(re.findall(r"`(\w+)`", re.sub(r"\([^)]*\)", "", found[1]))) if found else set()


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    model = write_model(tmp_path_factory.mktemp("model"), HERMES)
    server: Running
    with running(model, SETTINGS) as server, server.client() as client:
        yield client


@pytest.mark.parametrize("path", STRUCTS)
def test_the_page_has_every_field_of_ours_and_of_openais(path: str) -> None:
    kinds = [fields(path, kind) for kind in ("Honoured", "One value", "Without effect", "Refused")]
    assert sum(map(len, kinds)) == len(set().union(*kinds)), "a field is on one list"
    assert set().union(*kinds[:3]) == set(STRUCTS[path].__struct_fields__)
    known = set(OPENAIS[path].__annotations__) if path in OPENAIS else set()
    assert kinds[3] == known - set(STRUCTS[path].__struct_fields__)


@pytest.mark.parametrize("path", STRUCTS)
def test_what_is_to_be_refused_is_refused_by_name(client: httpx.Client, path: str) -> None:
    for name in (*fields(path, "Refused"), "no_such_field"):
        answer = client.post(path, json={**BODIES[path], name: "low"})
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == name


@pytest.mark.parametrize("path", STRUCTS)
def test_what_has_no_effect_is_accepted_with_any_value(client: httpx.Client, path: str) -> None:
    for name in fields(path, "Without effect"):
        for value in ("low", {"a": [1]}) if name != "max_tool_calls" else (1, 7):
            answer = client.post(path, json={**BODIES[path], name: value})
            assert answer.status_code == 200, answer.text


@pytest.mark.parametrize("path", STRUCTS)
def test_of_one_value_that_one_is_accepted(client: httpx.Client, path: str) -> None:
    for name in fields(path, "One value"):
        accepted, refused = ONE_VALUE[name]
        assert client.post(path, json={**BODIES[path], name: accepted}).status_code == 200
        answer = client.post(path, json={**BODIES[path], name: refused})
        assert answer.status_code == 400
        assert name in answer.json()["error"]["message"]
