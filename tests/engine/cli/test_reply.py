"""What a reader of a reply says about its speed: only what the times at which its deltas came bear out."""

from collections.abc import AsyncIterator, Iterator
from typing import cast

import pytest

from triode.actors.messages import Delta
from triode.engine.cli import reply
from triode.engine.cli.reply import read_reply
from triode.engine.stream import RequestStream
from triode.ids import RequestId, TokenId

Arrivals = list[tuple[float, int]]
"""When each delta was read, in seconds, and how many tokens it has."""


async def speed_of(arrivals: Arrivals, monkeypatch: pytest.MonkeyPatch) -> str:
    """As it is told for a prompt that was submitted at 10 s."""
    times: Iterator[float] = iter([10.0, *(time_s for time_s, _ in arrivals)])
    monkeypatch.setattr(reply, "perf_counter", lambda: next(times))

    async def deltas() -> AsyncIterator[Delta]:
        for _, num_tokens in arrivals:
            yield Delta(RequestId("a"), 0, "x" * num_tokens, (TokenId(1),) * num_tokens)

    return str(await read_reply(cast("RequestStream", deltas()), 10.0, show=False))


@pytest.mark.parametrize(
    ("arrivals", "told"),
    [
        ([(10.25, 1), (10.75, 1), (11.25, 1)], "TTFT 250 ms, 2.0 tokens/s"),
        ([(10.25, 3), (10.5, 2)], "TTFT 250 ms, 8.0 tokens/s"),
        ([(10.25, 5)], "TTFT 250 ms"),
        ([(10.25, 1), (10.2501, 4)], "TTFT 250 ms"),
        ([(10.25, 1)], "TTFT 250 ms"),
    ],
    ids=["one by one", "several in the first", "all in one", "read together", "one token"],
)
async def test_the_rate_is_of_tokens_after_the_first_and_of_none_that_were_read_together(
    arrivals: Arrivals, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert await speed_of(arrivals, monkeypatch) == told
