"""The end of service, as a first signal brings it: what is running may finish, until the deadline."""

import httpx
import pytest

from crashes import pausable_steps
from servers import ENDLESS, SERVERS, WIDE, running

TEXT = "/v1/completions"


def test_a_drain_lets_replies_finish_and_begins_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hypercorn closes the other client's connection instead of answering that it drains."""
    may_run = pausable_steps(monkeypatch, pause_after=10)
    with running() as server, server.client() as client, server.client() as other:
        assert other.get("/ready").status_code == 200
        with client.stream("POST", TEXT, json={**ENDLESS, "max_tokens": 400}) as stream:
            parts = stream.iter_text()
            text = next(parts)
            server.stop()
            while other.get("/ready").status_code == 200:
                pass
            refused = other.post(TEXT, json={"prompt": "x"})
            assert refused.status_code == 503
            assert refused.json()["error"]["code"] == "shutting_down"
            assert other.get("/health").status_code == 200
            with pytest.raises(httpx.ConnectError):
                httpx.get(f"{server.url}/health")
            may_run.set()
            text += "".join(parts)
        assert '"finish_reason":"length"' in text
        assert text.endswith("data: [DONE]\n\n")
        assert server.ended.wait(20)


@pytest.mark.parametrize("kind", SERVERS)
def test_the_deadline_cuts_replies_short_but_ends_them_well(kind: str) -> None:
    with running(server=kind, drain_s=0.1) as server, server.client() as client:
        with client.stream("POST", TEXT, json=ENDLESS) as stream:
            parts = stream.iter_text()
            text = next(parts)
            server.stop()
            text += "".join(parts)
        assert '"finish_reason":"cancelled"' in text
        assert text.endswith("data: [DONE]\n\n")
        assert server.ended.wait(20)


def test_a_reader_that_is_stuck_cannot_hold_the_end_up() -> None:
    with running(drain_s=0.1, write_timeout_s=600) as server, server.send(WIDE, receive_bytes=4096):
        server.wait_until_running(4)
        server.stop()
        # The deadline, and two seconds for connections to close: long before a write is given up.
        assert server.ended.wait(60)
