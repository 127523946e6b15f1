"""What a benchmark sends. Prompts are random token ids: what they say makes no difference to how long they take."""

from random import Random

import msgspec

MAX_TOKEN_ID = 10_000
"""Ids are drawn from 0 to this one, which every vocabulary worth measuring has."""


class Request(msgspec.Struct, frozen=True):
    """A prompt, and how many tokens follow it, whatever they are."""

    prompt: tuple[int, ...]
    new_tokens: int


class Workload(msgspec.Struct, frozen=True, kw_only=True):
    """One row of a table: requests that are sent together."""

    test: str
    requests: tuple[Request, ...]
    temperature: float = 0.0
    primer: tuple[int, ...] = ()
    """A prompt that has been computed, and is in the prefix cache, when the requests are sent."""


class Sizes(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of each test's sizes: the fields are its flags, the defaults take seconds on a laptop.

    Raises:
        ValueError: at construction, for a size below 1.
    """

    def __post_init__(self) -> None:
        for name in self.__struct_fields__:
            value = getattr(self, name)
            numbers = value if isinstance(value, tuple) else (value,)
            if not numbers or min(numbers) < self.lowest(name):
                raise ValueError(f"{name.replace('_', '-')} must be >= {self.lowest(name)}, got {value}")

    @staticmethod
    def lowest(name: str) -> int:
        """The least value of a field."""
        return 1


def random_prompt(rng: Random, num_tokens: int) -> tuple[int, ...]:
    """`num_tokens` random token ids."""
    return tuple(rng.randint(0, MAX_TOKEN_ID) for _ in range(num_tokens))


def equal_requests(num_requests: int, prompt_tokens: int, new_tokens: int) -> tuple[Request, ...]:
    """Different prompts of one length; the same ones in each process."""
    rng = Random(0)
    return tuple(Request(random_prompt(rng, prompt_tokens), new_tokens) for _ in range(num_requests))
