"""Who is served: keys, limits by key, origins, request ids, and what the log may say."""

import logging
import shutil
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from servers import ENDLESS, SERVERS, Running, running

TEXT = "/v1/completions"
SHORT = {"prompt": "Once upon a secret", "max_tokens": 1}


@pytest.fixture(scope="module", params=SERVERS)
def server(request: pytest.FixtureRequest) -> Iterator[Running]:
    with running(
        server=request.param,
        api_keys=("first", "second"),
        max_concurrent_per_key=1,
        allowed_origins=("https://a.example",),
    ) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[httpx.Client]:
    with server.client() as client:
        yield client


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.mark.parametrize("headers", [{}, bearer("wrong"), {"Authorization": "first"}, bearer("first2")])
def test_without_a_right_key_nothing_is_served(client: httpx.Client, headers: dict[str, str]) -> None:
    for response in (client.post(TEXT, json=SHORT, headers=headers), client.get("/v1/models", headers=headers)):
        assert response.status_code == 401
        assert response.headers["www-authenticate"] == "Bearer"
        assert response.json()["error"]["code"] == "invalid_api_key"
    assert client.post("/tokenize", json={"prompt": "x"}, headers=headers).status_code == 401


@pytest.mark.parametrize("key", ["first", "second"])
def test_every_key_is_served(client: httpx.Client, key: str) -> None:
    assert client.post(TEXT, json=SHORT, headers=bearer(key)).status_code == 200


def test_probes_need_no_key(client: httpx.Client) -> None:
    for path in ("/health", "/ready", "/version", "/metrics"):
        assert client.get(path).status_code == 200


def test_a_keys_limit_concerns_that_key_only(server: Running, client: httpx.Client) -> None:
    with client.stream("POST", TEXT, json=ENDLESS, headers=bearer("first")) as stream:
        parts = stream.iter_bytes()
        next(parts)
        refused = client.post(TEXT, json=SHORT, headers=bearer("first"))
        assert refused.status_code == 429
        assert refused.headers["retry-after"] == "1"
        assert refused.json()["error"]["code"] == "rate_limit_exceeded"
        assert client.post(TEXT, json=SHORT, headers=bearer("second")).status_code == 200
    server.wait_until_idle()
    assert client.post(TEXT, json=SHORT, headers=bearer("first")).status_code == 200


def test_every_answer_has_an_id_and_keeps_the_clients_own(client: httpx.Client) -> None:
    ids = {client.get(path).headers["x-request-id"] for path in ("/health", "/health", "/nope", "/v1/models")}
    assert len(ids) == 4
    given = client.get("/health", headers={"X-Request-Id": "mine-7"})
    assert given.headers["x-request-id"] == "mine-7"
    assert client.get("/health", headers={"X-Request-Id": "x" * 500}).headers["x-request-id"] != "x" * 500


def test_the_log_has_ids_and_statuses_but_no_texts(client: httpx.Client, caplog: pytest.LogCaptureFixture) -> None:
    def lines() -> list[str]:
        return [record.getMessage() for record in caplog.records if record.name == "triode.server"]

    def wait_for_lines(number: int) -> None:
        # A line is written when the answer has been sent.
        while len(lines()) < number:
            pass

    with caplog.at_level(logging.INFO):
        response = client.post(TEXT, json=SHORT, headers=bearer("first"))
        wait_for_lines(1)
        client.post(TEXT, json={**SHORT, "temperature": -1}, headers=bearer("first"))
        wait_for_lines(2)
        client.get("/a%0Ab", headers=bearer("first"))
        wait_for_lines(3)
    ok, refused, missing = lines()
    assert ok.startswith(f"{response.headers['x-request-id']} POST '/v1/completions' 200 ")
    assert " 400 " in refused
    assert "'/a\\nb' 404" in missing
    everything = " ".join(record.getMessage() for record in caplog.records)
    assert "secret" not in everything


def test_browsers_are_let_in_from_allowed_origins_only(client: httpx.Client) -> None:
    asking = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    allowed = client.options(TEXT, headers={**asking, "Origin": "https://a.example"})
    assert allowed.headers["access-control-allow-origin"] == "https://a.example"
    other = client.options(TEXT, headers={**asking, "Origin": "https://b.example"})
    assert "access-control-allow-origin" not in other.headers


def test_by_default_no_origin_is_let_in(server: Running) -> None:
    with running() as plain, plain.client() as client:
        response = client.get("/health", headers={"Origin": "https://a.example"})
        assert "access-control-allow-origin" not in response.headers


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes a certificate with openssl")
def test_a_certificate_serves_https(tmp_path: Path) -> None:
    certificate, key = tmp_path / "server.pem", tmp_path / "server.key"
    words = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=localhost"
    names = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run([*words.split(), *names], check=True, capture_output=True)
    with running(tls_certificate=str(certificate), tls_key=str(key)) as server:
        trusting = ssl.create_default_context(cafile=str(certificate))
        with httpx.Client(base_url=f"https://127.0.0.1:{server.port}", verify=trusting) as client:
            assert client.post(TEXT, json=SHORT).status_code == 200
