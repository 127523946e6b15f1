"""What Prometheus reads: the engine's counts, and the times of requests."""

from collections.abc import Iterator
from types import SimpleNamespace

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from engines import complete, greedy, open_tiny
from servers import ENDLESS, SERVERS, Running, running
from triode.actors.messages import Delta
from triode.engine.server import metrics
from triode.ids import RequestId, TokenId

TEXT = "/v1/completions"


@pytest.fixture(params=SERVERS)
def server(request: pytest.FixtureRequest) -> Iterator[Running]:
    with running(server=request.param) as server:
        yield server


def scrape(client: httpx.Client) -> dict[str, float]:
    response = client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    return samples_of(response.text)


def samples_of(text: str) -> dict[str, float]:
    """Samples by name, and by the label other than the model's."""
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            assert sample.labels.pop("model_name") == "random:tiny"
            found["/".join([sample.name, *sample.labels.values()])] = sample.value
    return found


def test_requests_are_counted_and_timed(server: Running) -> None:
    with server.client() as client:
        body = {"prompt": "word " * 40, "max_tokens": 5, "ignore_eos": True}
        client.post(TEXT, json=body)
        client.post(TEXT, json={**body, "stream": True})
        client.post(TEXT, json={**body, "temperature": -1})
        found = scrape(client)
    assert found["vllm:request_success_total/length"] == 2
    assert found["vllm:generation_tokens_total"] == 10
    assert found["vllm:prompt_tokens_total"] == 2 * 41
    assert found["vllm:prefix_cache_hits_total"] == 32
    for name in ("time_to_first_token", "e2e_request_latency"):
        assert found[f"vllm:{name}_seconds_count"] == 2
        assert 0 < found[f"vllm:{name}_seconds_sum"] < 60
    # There is no time between tokens that a busy machine brings all together.
    assert found["vllm:request_time_per_output_token_seconds_count"] == 2
    assert "vllm:inter_token_latency_seconds_count" in found
    assert found["vllm:request_generation_tokens_sum"] == 10
    assert found["triode:steps_total"] >= 10
    assert found["vllm:num_requests_running"] == found["vllm:num_requests_waiting"] == 0


async def test_times_are_those_at_which_tokens_came(monkeypatch: pytest.MonkeyPatch) -> None:
    async with open_tiny(executor="inline") as engine:
        result = await complete(engine, [1, 2, 3], greedy(5))
        times = iter([10.0, 10.5, 11.0, 11.5])
        monkeypatch.setattr(metrics, "time", SimpleNamespace(perf_counter=lambda: next(times)))
        watched = metrics.Metrics(engine, "random:tiny")
        timing = watched.timing()
        for num_tokens in (1, 4):
            timing.saw([Delta(RequestId("a"), 0, "x", (TokenId(1),) * num_tokens)])
        timing.ended(result)
        found = samples_of(watched.exposition().decode())
    assert found["vllm:time_to_first_token_seconds_sum"] == 0.5
    assert found["vllm:inter_token_latency_seconds_sum"] == 0.5 / 4
    assert found["vllm:request_time_per_output_token_seconds_sum"] == 0.5 / 4
    assert found["vllm:e2e_request_latency_seconds_sum"] == 1.5
    assert found["vllm:generation_tokens_total"] == found["vllm:request_generation_tokens_sum"] == 5


def test_a_request_that_fails_is_counted_as_such_and_one_that_is_refused_not_at_all(server: Running) -> None:
    failing = {"prompt": "x", "max_tokens": 500, "structured_outputs": {"grammar": 'start: s\ns: s s | "x"'}}
    with server.client() as client:
        ends = [name for name in scrape(client) if name.startswith("vllm:request_success_total/")]
        before = scrape(client)
        assert client.post(TEXT, json={"prompt": "x", "max_tokens": 10**6}).status_code == 400
        assert client.post("/v1/responses", json={"input": "x", "max_output_tokens": 10**6}).status_code == 400
        # The special tokens, the end among them, are forbidden, so that it runs out of fuel.
        bias = {str(token_id): -100 for token_id in range(17)}
        assert client.post(TEXT, json={**failing, "logit_bias": bias}).status_code == 400
        while (found := scrape(client))["vllm:request_success_total/error"] == before[
            "vllm:request_success_total/error"
        ]:
            pass
    assert {name: found[name] - before[name] for name in ends if found[name] != before[name]} == {
        "vllm:request_success_total/error": 1
    }


def test_what_runs_now_shows(server: Running) -> None:
    with server.client() as client:
        with client.stream("POST", TEXT, json={**ENDLESS, "n": 2}) as stream:
            parts = stream.iter_bytes()
            next(parts)
            with server.client() as other:
                found = scrape(other)
            assert found["vllm:num_requests_running"] == 2
            assert 0 < found["vllm:kv_cache_usage_perc"] < 1
            assert found["triode:requests_unfinished"] == 1
            assert {f"triode:actor_queue_depth/{name}" for name in ("scheduler", "detokenizer")} <= found.keys()
        server.wait_until_idle()
        # The client's leaving is noticed before the request is counted.
        while (found := scrape(client))["vllm:request_success_total/cancelled"] == 0:
            pass
        assert found["vllm:request_success_total/cancelled"] == 1
        assert found["vllm:num_requests_running"] == found["vllm:kv_cache_usage_perc"] == 0
