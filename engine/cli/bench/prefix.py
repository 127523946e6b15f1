"""What the prefix cache saves: the time to the first token of a prompt whose beginning has been computed before."""

from collections.abc import Iterator

from triode.engine.cli.bench.workload import Sizes, Workload, equal_requests


class PrefixSizes(Sizes, frozen=True, kw_only=True):
    """A row for each share."""

    percents: tuple[int, ...] = (0, 25, 50, 75, 99)
    """How much of the prompt is in the cache."""
    prompt_tokens: int = 1000
    """Tokens of the prompt."""

    @staticmethod
    def lowest(name: str) -> int:
        """A share may be nothing."""
        return 0 if name == "percents" else 1


SMALL = PrefixSizes()
FULL = PrefixSizes(prompt_tokens=4000)


def workloads(sizes: PrefixSizes) -> Iterator[Workload]:
    """The same request each time, after more and more of it."""
    requests = equal_requests(1, sizes.prompt_tokens, 1)
    for percent in sizes.percents:
        primer = requests[0].prompt[: sizes.prompt_tokens * percent // 100]
        yield Workload(test=f"prefix {percent} %", requests=requests, primer=primer)
