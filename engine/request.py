"""What a caller asks for, checked as far as it can be without the model's tokenizer."""

import sys
from collections.abc import Mapping, Sequence
from typing import cast

import msgspec

from triode.ids import RequestId, TokenId
from triode.models.conversation import Conversation
from triode.models.sampling import SamplingParams, is_unicode
from triode.models.step import Pooling

Prompt = str | Sequence[int] | Sequence[Mapping[str, object]] | Conversation
"""Raw text, token ids, or chat messages in OpenAI's shape, alone or with tools (then the model's chat template applies)."""


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """The arguments of one submit, checked as far as they can be without the tokenizer.

    Raises:
        ValueError: at construction, for an argument outside its limits.
    """

    prompt: str | tuple[TokenId, ...] | Conversation
    params: SamplingParams
    priority: int = 0
    cache_salt: str | None = None
    deadline_s: float | None = None
    pooling: Pooling | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.params, SamplingParams):
            raise ValueError(f"params must be SamplingParams, got {self.params!r}")
        check_priority(self.priority)
        check_cache_salt(self.cache_salt)
        check_deadline_s(self.deadline_s)


def build_request(
    prompt: Prompt,
    params: SamplingParams | None,
    *,
    priority: int,
    adapter: str | None,
    cache_salt: str | None,
    deadline_s: float | None,
) -> Request:
    """The arguments of `submit`, as every kind of engine takes them.

    Raises:
        ValueError: for an argument outside its limits.
    """
    if adapter is not None:
        raise ValueError(f"adapter must be None: adapters are not supported yet, got {adapter!r}")
    return Request(
        prompt=freeze_prompt(prompt),
        params=params or SamplingParams(),
        priority=priority,
        cache_salt=cache_salt,
        deadline_s=deadline_s,
    )


def embedding_request(prompt: Prompt, pooling: str) -> Request:
    """A request for the pooled hidden state of a prompt.

    Raises:
        ValueError: for an argument outside its limits.
    """
    if pooling not in tuple(Pooling):
        raise ValueError(f"pooling must be one of {', '.join(Pooling)}, got {pooling!r}")
    return Request(prompt=freeze_prompt(prompt), params=SamplingParams(max_tokens=1), pooling=Pooling(pooling))


def check_request_id(request_id: object) -> RequestId:
    """A caller's own name for a request.

    Raises:
        ValueError: if it is none.
    """
    if not isinstance(request_id, str) or not request_id:
        raise ValueError(f"request_id must be a non-empty string, got {request_id!r}")
    return RequestId(request_id)


def check_priority(priority: object) -> None:
    """Raise ValueError for what cannot be ordered."""
    if type(priority) is not int:
        raise ValueError(f"priority must be an integer, lower first, got {priority!r}")


def check_deadline_s(deadline_s: object) -> None:
    """Raise ValueError for what is neither None nor a time from now."""
    if deadline_s is None:
        return
    # An int may be larger than any float, and no clock could be set to it.
    if type(deadline_s) in (int, float) and 0 < cast("float", deadline_s) <= sys.float_info.max:
        return
    raise ValueError(f"deadline_s must be > 0 and finite, got {deadline_s!r}")


def check_cache_salt(cache_salt: object) -> None:
    """Raise ValueError for what is neither None nor a text that can be hashed."""
    if cache_salt is None:
        return
    if not isinstance(cache_salt, str) or not cache_salt:
        raise ValueError(f"cache_salt must be a non-empty string, got {cache_salt!r}")
    if not is_unicode(cache_salt):
        raise ValueError(f"cache_salt must be valid Unicode, got {cache_salt!r}")


def freeze_prompt(prompt: Prompt) -> str | tuple[TokenId, ...] | Conversation:
    """The prompt as it travels in a message.

    Raises:
        ValueError: if it is neither text, token ids nor chat messages.
    """
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, Conversation):
        return _freeze(prompt)
    given: object = prompt
    if not isinstance(given, Sequence) or isinstance(given, bytes | bytearray):
        raise ValueError(f"prompt must be text, token ids or chat messages, got {type(prompt).__name__}")
    # An enumeration's member or a bool is an int too, but hardly a token: types are compared, all at once.
    kinds = set(map(type, given))
    if kinds <= {int}:
        return tuple(cast("Sequence[TokenId]", prompt))
    if all(isinstance(item, Mapping) for item in prompt):
        return _freeze(Conversation(tuple(dict(item) for item in prompt if isinstance(item, Mapping))))
    names = ", ".join(sorted(kind.__name__ for kind in kinds))
    raise ValueError(f"prompt must hold either token ids (int) or chat messages (dict), got {names}")


def _freeze(chat: Conversation) -> Conversation:
    """Copies of plain values, all the way down: no code of the caller's runs in the engine, nor does a later change
    reach it."""
    try:
        plain = msgspec.to_builtins(chat, builtin_types=(bytes, bytearray))
        return Conversation(tuple(plain["messages"]), tuple(plain["tools"]), plain["options"])
    except (TypeError, RecursionError) as error:
        raise ValueError(f"prompt must hold messages of text, numbers, lists and dicts: {error}") from error
