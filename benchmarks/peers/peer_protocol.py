"""What every contestant does: read one line of JSON, generate, answer with the seconds that it took.

Contestants run in processes of their own, because each has an environment of its own; this file imports nothing that one
of them could lack. A request is `{"prompts": [[token ids]], "new_tokens": n}`. All prompts of a request are as long as
each other.
"""

import json
import sys
from collections.abc import Callable
from time import perf_counter

MARK = "contestant: "
"""Begins the lines that are answers: libraries print what they like besides."""

Generate = Callable[[list[list[int]], int], object]
"""Greedy generation of so many new tokens for each prompt, none of which ends a reply."""


def answer_requests(generate: Generate) -> None:
    """Time `generate` until the input ends."""
    _say({"ready": True})
    for line in sys.stdin:
        request = json.loads(line)
        start_s = perf_counter()
        generate(request["prompts"], request["new_tokens"])
        _say({"seconds": perf_counter() - start_s})


def _say(answer: dict[str, object]) -> None:
    sys.stdout.write(f"{MARK}{json.dumps(answer)}\n")
    sys.stdout.flush()
