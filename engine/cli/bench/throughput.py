"""How many tokens a second come out of many requests of different lengths, all sent at once.

The draw is that of nano-vllm's bench.py (github.com/GeeeekExplorer/nano-vllm): with the full sizes, 256 requests of
142,827 tokens in and 133,966 out.
"""

from collections.abc import Iterator
from random import Random

from triode.engine.cli.bench.workload import Request, Sizes, Workload, random_prompt


class ThroughputSizes(Sizes, frozen=True, kw_only=True):
    """Prompt and output lengths are uniform between the bounds."""

    requests: int = 16
    """How many requests are sent together."""
    min_tokens_each: int = 16
    """The shortest prompt and output."""
    max_tokens_each: int = 128
    """The longest prompt and output."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.min_tokens_each > self.max_tokens_each:
            raise ValueError(
                f"min-tokens-each must be <= max-tokens-each = {self.max_tokens_each}, got {self.min_tokens_each}"
            )


SMALL = ThroughputSizes()
FULL = ThroughputSizes(requests=256, min_tokens_each=100, max_tokens_each=1024)


def workloads(sizes: ThroughputSizes) -> Iterator[Workload]:
    """All prompts are drawn first, then all output lengths."""
    rng = Random(0)
    low, high = sizes.min_tokens_each, sizes.max_tokens_each
    prompts = [random_prompt(rng, rng.randint(low, high)) for _ in range(sizes.requests)]
    requests = tuple(Request(prompt, rng.randint(low, high)) for prompt in prompts)
    yield Workload(test="throughput", requests=requests, temperature=0.6)
