"""A tokenizer as llguidance wants one: the bytes of every token, and the tokens that spell a text."""

from collections.abc import Sequence
from functools import cached_property, lru_cache

from llguidance import LLTokenizer, TokenizerWrapper

from triode.models.tokenizer import Tokenizer

_MARK = "\x02"
_MAX_SPELLED = 256
"""Texts whose tokens are kept: what guides leave no choice about is said again and again."""


def vocabulary_for(tokenizer: Tokenizer, vocab_size: int, eos_token_ids: tuple[int, ...]) -> LLTokenizer:
    """The trie of all tokens, with what masks have in common."""
    return LLTokenizer(
        TokenizerWrapper(Vocabulary(tokenizer, eos_token_ids[0], vocab_size)),
        n_vocab=max(vocab_size, tokenizer.vocab_size),
        eos_token=list(eos_token_ids),
    )


class Vocabulary:
    """A tokenizer as llguidance wants one."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, eos_token_id: int, vocab_size: int = 0) -> None:
        self.eos_token_id = eos_token_id
        spelled = [tokenizer.token_bytes(token_id) for token_id in range(tokenizer.vocab_size)]
        self.tokens = spelled + [b""] * (vocab_size - len(spelled))
        """The bytes that each token stands for: none where logits are padded, and what has none is never allowed."""
        self.special_token_ids = sorted(tokenizer.special_ids)
        self._encode = tokenizer.encode
        self._kept = lru_cache(_MAX_SPELLED)(self._spell)

    def __call__(self, text: str) -> list[int]:
        """Tokens that spell `text` and nothing else, as the model would have seen them in the middle of a text."""
        return [*self._kept(text)]

    def _spell(self, text: str) -> list[int]:
        data = text.encode()
        token_ids = self._encode(text, add_special_tokens=False)
        if self._spelled(token_ids) == data:
            return token_ids
        # Some put a space before each text: this one then goes to the mark, which is taken off again.
        token_ids = self._encode(_MARK + text, add_special_tokens=False)
        for start in range(1, len(token_ids) + 1):
            if self._spelled(token_ids[:start]).endswith(_MARK.encode()):
                return token_ids[start:] if self._spelled(token_ids[start:]) == data else self._longest(data)
        return self._longest(data)

    def _spelled(self, token_ids: Sequence[int]) -> bytes:
        return b"".join([self.tokens[token_id] for token_id in token_ids])

    def _longest(self, data: bytes) -> list[int]:
        """The longest token that fits, again and again: for texts that the tokenizer would change."""
        token_ids = []
        while data:
            ends = range(min(len(data), self._max_bytes), 0, -1)
            token_id = next((self._id_of[data[:end]] for end in ends if data[:end] in self._id_of), None)
            if token_id is None:
                break
            token_ids.append(token_id)
            data = data[len(self.tokens[token_id]) :]
        return token_ids

    @cached_property
    def _id_of(self) -> dict[bytes, int]:
        special = set(self.special_token_ids)
        return {spelling: id_ for id_, spelling in enumerate(self.tokens) if spelling and id_ not in special}

    @cached_property
    def _max_bytes(self) -> int:
        return max(map(len, self._id_of))
