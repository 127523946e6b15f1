"""From what the caller wrote to tokens the scheduler can queue, or the reason why it cannot."""

from itertools import chain
from typing import NamedTuple

import msgspec

from triode.actors.messages import Rejected, Submit, Tokenized
from triode.ids import TokenId, pack_tokens
from triode.models.conversation import Conversation
from triode.models.sampling import SamplingParams, check_token_ids, is_unicode
from triode.models.tokenizer import Tokenizer


class Limits(msgspec.Struct, frozen=True):
    """What a request must fit into."""

    max_context_tokens: int
    """Prompt and output together."""
    pool_tokens: int
    """Tokens for which the KV cache has room."""
    block_size_tokens: int
    vocab_size: int
    eos_token_ids: tuple[TokenId, ...]

    @property
    def max_sequence_tokens(self) -> int:
        """The longest sequence that can ever be computed; the last token's KV entry is never needed."""
        return min(self.max_context_tokens, self.pool_tokens + 1)


class Encoded(NamedTuple):
    """A prompt's tokens."""

    token_ids: tuple[TokenId, ...]
    packed_ids: bytes
    """The same, as `pack_tokens` makes them."""


def prepare(submit: Submit, tokenizer: Tokenizer, limits: Limits) -> Tokenized | Rejected:
    """Encode and check one request."""
    try:
        encoded = encode(submit.prompt, tokenizer, limits)
        params = resolve(submit.params, len(encoded.token_ids), limits, pools=submit.pooling is not None)
        bad_word_ids = encode_bad_words(params.bad_words, tokenizer)
        check_token_ids("bad_words", chain.from_iterable(bad_word_ids), limits.vocab_size)
    except ValueError as error:
        return Rejected(submit.request_id, submit.arrival, str(error))
    except RecursionError:
        return Rejected(submit.request_id, submit.arrival, "prompt must hold messages that are nested less deeply")
    eos_token_ids = () if params.ignore_eos else limits.eos_token_ids
    return Tokenized(
        request_id=submit.request_id,
        arrival=submit.arrival,
        token_ids=encoded.token_ids,
        packed_ids=encoded.packed_ids,
        params=params,
        seed=submit.seed,
        stop_token_ids=tuple(dict.fromkeys((*eos_token_ids, *map(TokenId, params.stop_token_ids)))),
        bad_word_ids=bad_word_ids,
        priority=submit.priority,
        cache_salt=submit.cache_salt,
        deadline_at_s=submit.deadline_at_s,
        pooling=submit.pooling,
    )


def encode(prompt: str | tuple[TokenId, ...] | Conversation, tokenizer: Tokenizer, limits: Limits) -> Encoded:
    """The prompt's tokens.

    Raises:
        ValueError: if it is empty, too long, or holds an id outside the vocabulary.
    """
    if isinstance(prompt, str):
        token_ids = _encode_text(prompt, tokenizer, limits, add_special_tokens=True)
    elif isinstance(prompt, Conversation):
        text = tokenizer.apply_chat_template(prompt)
        token_ids = _encode_text(text, tokenizer, limits, add_special_tokens=False)
    else:
        token_ids = prompt
    if not token_ids:
        raise ValueError("prompt must have at least one token, got none")
    if len(token_ids) >= limits.max_sequence_tokens:
        raise ValueError(
            f"prompt must have fewer than {limits.max_sequence_tokens} tokens, to leave room for at least one more in "
            f"{_bound(limits)}, got {len(token_ids)}"
        )
    return Encoded(token_ids, _pack(token_ids, limits.vocab_size))


def _pack(token_ids: tuple[TokenId, ...], vocab_size: int) -> bytes:
    """They are looked at together: one by one would take twice as long, and a prompt's first step waits."""
    try:
        packed = pack_tokens(token_ids)
    except OverflowError:
        packed = b""
    # Where caches are cold numpy takes as long to find the largest of 4,000, and seven times as long of 128.
    if not packed or max(token_ids) >= vocab_size:
        check_token_ids("prompt", token_ids, vocab_size)
    return packed


def _encode_text(text: str, tokenizer: Tokenizer, limits: Limits, *, add_special_tokens: bool) -> tuple[TokenId, ...]:
    if not is_unicode(text):
        raise ValueError("prompt must be valid Unicode, got text without a UTF-8 form")
    # A token stands for so many bytes at most, so a text far too long is refused before the work of encoding it.
    if (num_tokens := tokenizer.min_tokens(text)) >= limits.max_sequence_tokens:
        raise ValueError(
            f"prompt must have fewer than {limits.max_sequence_tokens} tokens, to leave room for at least one more in "
            f"{_bound(limits)}, got a text of at least {num_tokens}"
        )
    # It may know more tokens than the model has embeddings for.
    return tuple(map(TokenId, tokenizer.encode(text, add_special_tokens=add_special_tokens)))


def resolve(params: SamplingParams, num_prompt_tokens: int, limits: Limits, *, pools: bool) -> SamplingParams:
    """The parameters with `max_tokens` filled in.

    Raises:
        ValueError: if the request could never fit, or names tokens outside the vocabulary.
    """
    check_token_ids("stop_token_ids", params.stop_token_ids, limits.vocab_size)
    check_token_ids("logit_bias", params.logit_bias or (), limits.vocab_size)
    if pools:
        return msgspec.structs.replace(params, max_tokens=1, min_tokens=0)
    room = limits.max_sequence_tokens - num_prompt_tokens
    max_tokens = room if params.max_tokens is None else params.max_tokens
    if max_tokens > room:
        raise ValueError(
            f"max_tokens must be <= {room}, the room that the prompt's {num_prompt_tokens} tokens leave in "
            f"{_bound(limits)}, got {max_tokens}"
        )
    if params.min_tokens > max_tokens:
        raise ValueError(f"min_tokens must be <= max_tokens = {max_tokens}, got {params.min_tokens}")
    _check_pool(params.n, num_prompt_tokens, max_tokens, limits)
    # A copy is checked anew, every parameter of it.
    return params if params.max_tokens == max_tokens else msgspec.structs.replace(params, max_tokens=max_tokens)


def _check_pool(n: int, num_prompt_tokens: int, max_tokens: int, limits: Limits) -> None:
    """All samples at once: they share the prompt's full blocks."""
    size = limits.block_size_tokens
    shared_blocks = num_prompt_tokens // size if n > 1 else 0
    # The last token is sampled but never computed.
    blocks_each = -(-(num_prompt_tokens + max_tokens - 1) // size) - shared_blocks
    num_tokens = (shared_blocks + n * blocks_each) * size
    if num_tokens > limits.pool_tokens:
        raise ValueError(
            f"prompt and max_tokens, times n = {n}, must fit the KV cache of {limits.pool_tokens} tokens, "
            f"got {num_prompt_tokens} + {max_tokens} tokens, which take {num_tokens}"
        )


def _bound(limits: Limits) -> str:
    if limits.max_context_tokens <= limits.pool_tokens:
        return f"the context of {limits.max_context_tokens} tokens"
    return f"the KV cache of {limits.pool_tokens} tokens"


def encode_bad_words(words: tuple[str, ...], tokenizer: Tokenizer) -> tuple[tuple[TokenId, ...], ...]:
    """Each word as the tokenizer writes it at the start of a text and after a space."""
    found: dict[tuple[TokenId, ...], None] = {}
    for word in words:
        for text in (word, " " + word):
            token_ids = tuple(map(TokenId, tokenizer.encode(text, add_special_tokens=False)))
            if token_ids:
                found[token_ids] = None
    return tuple(found)
