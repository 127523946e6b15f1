"""Logits may be wider than the tokenizer, as Qwen's and most models' are: masks are, too, and fillers are never allowed."""

import numpy as np
import pytest

from guides import COLOURS, EOS, PERSON, tiny_tokenizer
from triode.models.grammar import GuideCompiler
from triode.models.guide import Guide


@pytest.mark.parametrize("guide", [PERSON, COLOURS])
@pytest.mark.parametrize("num_matchers", [1, 3])
def test_masks_are_as_wide_as_the_logits_and_allow_no_filler(guide: Guide, num_matchers: int) -> None:
    tokenizer = tiny_tokenizer()
    masks = []
    for vocab_size in (tokenizer.vocab_size, tokenizer.vocab_size + 1000):
        guides = GuideCompiler(tokenizer, vocab_size, (EOS,))
        guides.check(guide)
        mask_GW = np.zeros((num_matchers, guides.masks.num_words), np.int32)
        guides.masks.fill([guides.matcher(guide, []) for _ in range(num_matchers)], mask_GW)
        masks.append(np.unpackbits(mask_GW.view(np.uint8), axis=1, bitorder="little")[:, :vocab_size])
        guides.close()
    narrow, wide = masks
    assert narrow.any()
    assert np.array_equal(wide[:, : tokenizer.vocab_size], narrow)
    assert not wide[:, tokenizer.vocab_size :].any()
