"""How one kind of endpoint says what the engine did: whole, or chunk by chunk."""

import secrets
import time
from collections.abc import Sequence
from typing import Protocol

import msgspec

from triode.actors.messages import Delta, FinishReason
from triode.engine import completion
from triode.engine.completion import Result
from triode.engine.server.openai_responses import PromptTokensDetails, Usage
from triode.engine.server.service import Service


class Dialect(Protocol):
    """Writes the answer to one request. Choice c of prompt p has the index p * n + c."""

    answer_id: str

    def opening(self, num_choices: int) -> Sequence[msgspec.Struct]:
        """The chunks before the first token."""

    def chunk(self, choice: int, delta: Delta) -> msgspec.Struct | None:
        """What one step brought to one choice; None if nothing of it can be told yet."""

    def end(self, choice: int, reason: FinishReason) -> msgspec.Struct:
        """The last chunk of a choice whose end came with no token."""

    def usage(self, usage: Usage) -> msgspec.Struct:
        """The chunk after all others."""

    def answer(self, results: Sequence[Result]) -> msgspec.Struct:
        """The whole answer."""


def head(service: Service, kind: str, prefix: str) -> dict[str, object]:
    """The fields that all parts of one answer share."""
    return {
        "id": f"{prefix}-{secrets.token_hex(12)}",
        "object": kind,
        "created": int(time.time()),
        "model": service.model_name,
        "system_fingerprint": service.fingerprint,
    }


def usage_of(usages: Sequence[completion.Usage]) -> Usage:
    """The tokens of all prompts of a request."""
    prompt = sum(usage.prompt_tokens for usage in usages)
    output = sum(usage.completion_tokens for usage in usages)
    cached = sum(usage.cached_tokens for usage in usages)
    return Usage(prompt, output, prompt + output, PromptTokensDetails(cached))
