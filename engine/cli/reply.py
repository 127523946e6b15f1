"""Reads a stream to its end, and how fast it came."""

import sys
from time import perf_counter

import msgspec

from triode.engine.stream import RequestStream

SHORTEST_S = 0.001
"""No rate is given for tokens that came within a shorter time."""


class Speed(msgspec.Struct, frozen=True):
    """How fast a reply came, as its reader saw it."""

    ttft_ms: float
    """From submitting the prompt to the first token."""
    tokens_per_s: float | None
    """Of the tokens after the first; None if there are none, or they came at once."""

    def __str__(self) -> str:
        rate = "" if self.tokens_per_s is None else f", {self.tokens_per_s:.1f} tokens/s"
        return f"TTFT {self.ttft_ms:.0f} ms{rate}"


async def read_reply(stream: RequestStream, submitted_at_s: float, *, show: bool) -> Speed:
    """Read all of `stream`; with `show`, print the first sample's text as it comes."""
    first_at_s = last_at_s = perf_counter()
    num_tokens = num_first_tokens = 0
    async for delta in stream:
        last_at_s = perf_counter()
        if num_tokens == 0:
            first_at_s, num_first_tokens = last_at_s, len(delta.token_ids)
        num_tokens += len(delta.token_ids)
        if show and delta.index == 0:
            sys.stdout.write(delta.text)
            sys.stdout.flush()
    num_more, took_s = num_tokens - num_first_tokens, last_at_s - first_at_s
    return Speed(
        ttft_ms=(first_at_s - submitted_at_s) * 1e3,
        # Deltas that were read together say nothing about how fast they came.
        tokens_per_s=num_more / took_s if num_more and took_s >= SHORTEST_S else None,
    )
