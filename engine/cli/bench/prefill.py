"""How fast prompts are read: long ones, followed by a single token."""

from collections.abc import Iterator

from triode.engine.cli.bench.workload import Sizes, Workload, equal_requests


class PrefillSizes(Sizes, frozen=True, kw_only=True):
    """One row."""

    requests: int = 1
    """How many prompts are sent together."""
    prompt_tokens: int = 1024
    """Tokens of each prompt."""


SMALL = PrefillSizes()
FULL = PrefillSizes(requests=8, prompt_tokens=4096)


def workloads(sizes: PrefillSizes) -> Iterator[Workload]:
    """Equal requests of one new token."""
    yield Workload(test="prefill", requests=equal_requests(sizes.requests, sizes.prompt_tokens, 1))
