"""What a caller asks for, checked as far as it can be without the model's tokenizer."""

from collections.abc import Mapping, Sequence

import msgspec

from triode.actors.messages import ChatMessages
from triode.ids import TokenId
from triode.models.sampling import SamplingParams

Prompt = str | Sequence[int] | Sequence[Mapping[str, object]]
"""Raw text, token ids, or chat messages in OpenAI's shape (then the model's chat template applies)."""


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """The arguments of one submit, checked as far as they can be without the tokenizer.

    Raises:
        ValueError: at construction, for an argument outside its limits.
    """

    prompt: str | tuple[TokenId, ...] | ChatMessages
    params: SamplingParams
    priority: int = 0
    cache_salt: str | None = None
    deadline_s: float | None = None
    pool_hidden: bool = False

    def __post_init__(self) -> None:
        if type(self.priority) is not int:
            raise ValueError(f"priority must be an integer, lower first, got {self.priority!r}")
        if self.cache_salt is not None and (type(self.cache_salt) is not str or not self.cache_salt):
            raise ValueError(f"cache_salt must be a non-empty string, got {self.cache_salt!r}")
        if self.deadline_s is not None and not self.deadline_s > 0:
            raise ValueError(f"deadline_s must be > 0, got {self.deadline_s!r}")


def freeze_prompt(prompt: Prompt) -> str | tuple[TokenId, ...] | ChatMessages:
    """The prompt as it travels in a message.

    Raises:
        ValueError: if it is neither text, token ids nor chat messages.
    """
    if isinstance(prompt, str):
        return prompt
    given: object = prompt
    if not isinstance(given, Sequence) or isinstance(given, bytes | bytearray):
        raise ValueError(f"prompt must be text, token ids or chat messages, got {type(prompt).__name__}")
    if all(isinstance(item, Mapping) for item in prompt):
        return tuple(dict(item) for item in prompt if isinstance(item, Mapping))
    if all(type(item) is int for item in prompt):
        return tuple(TokenId(item) for item in prompt if isinstance(item, int))
    kinds = sorted({type(item).__name__ for item in prompt})
    raise ValueError(f"prompt must hold either token ids (int) or chat messages (dict), got {', '.join(kinds)}")
