"""What `triode bench serve` sends, and when: the same for every server, from a seed.

Lengths are drawn as they are in conversations people have shared (the ShareGPT data set): most are short, a few are long. They
are log-normal, with the medians below, and cut at `max_tokens_each`. Words are common ones that most tokenizers take for
a token each; what a prompt came to is counted by the server.
"""

import math
from collections.abc import Iterator
from random import Random

import msgspec

MEDIAN_PROMPT_TOKENS, PROMPT_SPREAD = 80, 1.2
MEDIAN_OUTPUT_TOKENS, OUTPUT_SPREAD = 130, 0.9
SHORTEST = 4
_COMMON = """
    the of and to in is you that it he was for on are as with his they at be this have from or one had by word but
    not what all were we when your can said there use an each which she do how their if will up other about out many
    then them these so some her would make like him into time has look two more write go see number no way could
    people
"""
_WORDS = _COMMON.split()


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """One run: its requests come at a rate, or so many are kept under way.

    Raises:
        ValueError: at construction, for a value outside its limits.
    """

    num_requests: int
    rate: float | None = None
    """Requests a second, at random moments (Poisson)."""
    concurrency: int | None = None
    """Unfinished requests at any time."""
    max_tokens_each: int = 1024
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.rate is None) == (self.concurrency is None):
            raise ValueError("either rate or concurrency must be given")
        for name in ("num_requests", "rate", "concurrency", "max_tokens_each"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} must be > 0, got {value}")

    @property
    def name(self) -> str:
        """As tables call it."""
        return f"{self.rate:g}/s" if self.concurrency is None else f"{self.concurrency} at a time"


class Question(msgspec.Struct, frozen=True):
    """One request."""

    due_at_s: float
    """When it is sent, from the run's start; 0 where it waits for an earlier one to end."""
    prompt: str
    max_tokens: int


def questions(load: Load) -> Iterator[Question]:
    """The requests of a run, in order."""
    # The requests are the same at every rate.
    rng, moments = Random(load.seed), Random(load.seed)
    due_at_s = 0.0
    for number in range(load.num_requests):
        num_words = _length(rng, MEDIAN_PROMPT_TOKENS, PROMPT_SPREAD, load.max_tokens_each)
        # The number keeps prompts apart, so that none is in another's cache.
        prompt = " ".join([str(number), *rng.choices(_WORDS, k=num_words - 1)])
        max_tokens = _length(rng, MEDIAN_OUTPUT_TOKENS, OUTPUT_SPREAD, load.max_tokens_each)
        yield Question(due_at_s, prompt, max_tokens)
        if load.rate is not None:
            due_at_s += moments.expovariate(load.rate)


def _length(rng: Random, median: int, spread: float, longest: int) -> int:
    drawn = rng.lognormvariate(math.log(median), spread)
    return min(max(round(drawn), min(SHORTEST, longest)), longest)
