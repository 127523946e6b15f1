"""How long one token takes, alone and among others, and how long the first one takes."""

from collections.abc import Iterator

from triode.engine.cli.bench.workload import Sizes, Workload, equal_requests


class LatencySizes(Sizes, frozen=True, kw_only=True):
    """A row for each batch size."""

    batches: tuple[int, ...] = (1, 4, 16)
    """How many requests are sent together."""
    prompt_tokens: int = 128
    """Tokens of each prompt."""
    new_tokens: int = 64
    """Tokens that follow each prompt."""


SMALL = LatencySizes()
FULL = LatencySizes(batches=(1, 64, 256), new_tokens=256)


def workloads(sizes: LatencySizes) -> Iterator[Workload]:
    """Equal requests, greedy."""
    for batch in sizes.batches:
        yield Workload(test="latency", requests=equal_requests(batch, sizes.prompt_tokens, sizes.new_tokens))
