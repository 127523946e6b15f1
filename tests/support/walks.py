"""Outputs drawn from masks alone, as a model that knows nothing would write them."""

from collections.abc import Sequence
from random import Random

import numpy as np

from guides import EOS
from triode.ids import TokenId
from triode.models.grammar import GuideCompiler
from triode.models.guide import Guide
from triode.models.matcher import MaskWords, Matcher
from triode.models.tokenizer import Tokenizer


def mask_of(guides: GuideCompiler, matcher: Matcher) -> MaskWords:
    mask_W: MaskWords = np.zeros(guides.masks.num_words, np.int32)
    guides.masks.fill([matcher], mask_W[None])
    return mask_W


def allowed(guides: GuideCompiler, matcher: Matcher) -> list[TokenId]:
    bits = np.unpackbits(mask_of(guides, matcher).view(np.uint8), bitorder="little")
    return [TokenId(token_id) for token_id in bits.nonzero()[0].tolist()]


def accepts(guides: GuideCompiler, guide: Guide, token_ids: Sequence[int]) -> bool:
    """Whether an output of these tokens is allowed, and may end there."""
    matcher = guides.matcher(guide, [TokenId(token_id) for token_id in token_ids])
    return EOS in allowed(guides, matcher)


def walk(guides: GuideCompiler, guide: Guide, tokenizer: Tokenizer, random: Random, max_tokens: int) -> bytes | None:
    """An output of random allowed tokens that prefers to end; None if it has not ended by `max_tokens`."""
    matcher = guides.matcher(guide, [])
    output = b""
    for _ in range(max_tokens):
        token_ids = allowed(guides, matcher)
        assert token_ids, matcher.error
        if EOS in token_ids and (len(token_ids) == 1 or random.random() < 0.5):
            return output
        token_ids = [token_id for token_id in token_ids if token_id != EOS]
        closing = [token_id for token_id in token_ids if tokenizer.token_bytes(token_id)[:1] in b'"]}']
        token_id = random.choice(closing if closing and random.random() < 0.4 else token_ids)
        output += tokenizer.token_bytes(token_id)
        matcher.append(token_id)
    return None
