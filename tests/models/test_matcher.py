"""Masks: the same however tokens arrive, and within a budget whatever a guide's author wants them to cost."""

from collections.abc import Sequence
from random import Random

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from guides import EOS, PERSON, tiny_guides, tiny_tokenizer
from triode.ids import TokenId
from triode.models import matcher as matcher_module
from triode.models.grammar import GuideCompiler
from triode.models.guide import Choices, Grammar, Guide, JsonSchema, Regex
from triode.models.matcher import MAX_FORCED_BYTES, MAX_FORCED_TOKENS, Matcher, costliest
from walks import allowed, mask_of

AMBIGUOUS = Grammar('start: s\ns: s s | "x"')
"""Its parser has more to remember, and to combine, with each token."""


def compiles(guide: Guide) -> bool:
    try:
        tiny_guides().check(guide)
    except ValueError:
        return False
    return True


def test_a_mask_does_not_depend_on_how_tokens_arrived() -> None:
    token_ids = [TokenId(token_id) for token_id in tiny_tokenizer().encode('{"name":"Ada","a')]
    one_by_one = tiny_guides().matcher(PERSON, [])
    for token_id in token_ids:
        one_by_one.append(token_id)
        mask = mask_of(tiny_guides(), one_by_one).copy()
    assert np.array_equal(mask, mask_of(tiny_guides(), tiny_guides().matcher(PERSON, token_ids)))
    together = [tiny_guides().matcher(PERSON, token_ids[:number]) for number in range(len(token_ids) + 1)]
    mask_GW = np.zeros((len(together), tiny_guides().masks.num_words), np.int32)
    tiny_guides().masks.fill(together, mask_GW)
    assert np.array_equal(mask_GW[-1], mask)


def test_a_forbidden_token_ends_its_own_sequence_alone() -> None:
    bad, good = tiny_guides().matcher(PERSON, [TokenId(77)]), tiny_guides().matcher(PERSON, [])
    mask_GW = np.full((2, tiny_guides().masks.num_words), -1, np.int32)
    tiny_guides().masks.fill([bad, good], mask_GW)
    assert bad.error is not None
    assert bad.error.startswith("the guide cannot be followed any further: ")
    assert not mask_GW[0].any()
    assert mask_GW[1].any()
    assert good.error is None


EXPLODING: list[Guide] = [
    Regex("((a{1,1000}){1,1000}){1,1000}"),
    Regex("(.*a.{0,20}){20}"),
    Regex("(?:a?){2000}a{2000}"),
    JsonSchema(
        {"anyOf": [{"properties": {f"p{i}_{j}": {"pattern": f"a{i}.*b"} for j in range(9)}} for i in range(99)]}
    ),
]


@pytest.mark.parametrize("guide", EXPLODING, ids=lambda guide: str(guide)[:30])
def test_a_guide_that_explodes_is_refused_or_ends_its_own_sequence(guide: Guide) -> None:
    guides = tiny_guides()
    if not compiles(guide):
        return
    matcher, neighbour = guides.matcher(guide, []), guides.matcher(PERSON, [])
    mask_GW = np.zeros((2, guides.masks.num_words), np.int32)
    for _ in range(30):
        guides.masks.fill([matcher, neighbour], mask_GW)
        assert mask_GW[1].any()
        if matcher.error is not None:
            assert not mask_GW[0].any()
            return
        token_ids = [token for token in allowed(guides, matcher) if token != EOS]
        matcher.append(token_ids[0])


def follow(guides: GuideCompiler, guide: Guide, max_tokens: int) -> tuple[int, str | None]:
    """How many tokens a sequence takes, and why it takes no more. A neighbour has its mask in each step."""
    matcher, neighbour = guides.matcher(guide, []), guides.matcher(PERSON, [])
    mask_GW = np.zeros((2, guides.masks.num_words), np.int32)
    for num_tokens in range(max_tokens):
        guides.masks.fill([matcher, neighbour], mask_GW)
        assert mask_GW[1].any(), neighbour.error
        if matcher.error is not None:
            assert not mask_GW[0].any()
            return num_tokens, matcher.error
        matcher.append(next(token for token in allowed(guides, matcher) if token != EOS))
    return max_tokens, None


def test_an_ambiguous_guide_runs_out_of_fuel_at_the_same_token_each_time() -> None:
    ends = [follow(tiny_guides(), AMBIGUOUS, 200) for _ in range(2)]
    assert ends[0] == ends[1]
    num_tokens, error = ends[0]
    assert 20 < num_tokens < 200
    assert "items; max is 200" in (error or "")


def test_a_well_meant_guide_has_fuel_to_spare() -> None:
    names = {f"field_{number}": {"type": "string"} for number in range(200)}
    wide = JsonSchema({"type": "object", "properties": names})
    options = Choices(tuple(f"option number {number}" for number in range(5000)))
    arithmetic = Grammar('start: e\ne: e "+" e | e "*" e | "(" e ")" | /[0-9]+/ | /[a-z]+/')
    for guide in (wide, options, arithmetic):
        matcher = tiny_guides().matcher(guide, [])
        for seed in range(60):
            token_ids = allowed(tiny_guides(), matcher)
            assert matcher.error is None, guide
            if token_ids == [EOS]:
                break
            matcher.append(Random(seed).choice([token for token in token_ids if token != EOS]))


times = st.lists(st.integers(0, 10), max_size=12)


@given(times, st.integers(0, 30))
def test_the_fewest_fail_without_which_the_others_are_within_the_budget(took_s: list[int], budget_s: int) -> None:
    rows = costliest(took_s, budget_s)
    kept_s = [each_s for row, each_s in enumerate(took_s) if row not in rows]
    assert sum(kept_s) <= budget_s
    assert not rows or sum(kept_s) + took_s[rows[-1]] > budget_s
    assert all(took_s[row] >= each_s for row in rows for each_s in kept_s)


def suspects(guides: GuideCompiler, guide_list: Sequence[Guide]) -> list[Matcher]:
    matchers = [guides.matcher(guide, []) for guide in guide_list]
    for matcher in matchers:
        matcher.is_suspect = True
    return matchers


def test_a_slow_fill_has_the_next_one_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    guides = tiny_guides()
    matchers = [guides.matcher(guide, []) for guide in (PERSON, AMBIGUOUS)]
    mask_GW = np.zeros((2, guides.masks.num_words), np.int32)
    monkeypatch.setattr(matcher_module, "MAX_FILL_S", 0.0)
    guides.masks.fill(matchers, mask_GW)
    assert [matcher.is_suspect for matcher in matchers] == [True, True]
    monkeypatch.setattr(matcher_module, "MAX_FILL_S", 1000.0)
    monkeypatch.setattr(matcher_module, "CHEAP_MASK_S", 1000.0)
    guides.masks.fill(matchers, mask_GW)
    assert [(matcher.is_suspect, matcher.error) for matcher in matchers] == [(False, None)] * 2
    assert mask_GW.any(axis=1).all()


def test_who_is_over_a_budget_fails_and_who_is_cheap_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    guides = tiny_guides()
    mask_GW = np.zeros((2, guides.masks.num_words), np.int32)
    for setting, over in (("MAX_MASK_S", True), ("MAX_FILL_S", False)):
        with monkeypatch.context() as patch:
            patch.setattr(matcher_module, setting, 0.0)
            patch.setattr(matcher_module, "CHEAP_MASK_S", 1000.0)
            cheap = suspects(guides, [PERSON, AMBIGUOUS])
            guides.masks.fill(cheap, mask_GW)
            assert [matcher.error is not None for matcher in cheap] == [over, over]
            assert mask_GW.any() == (not over)
    monkeypatch.setattr(matcher_module, "MAX_FILL_S", 0.0)
    monkeypatch.setattr(matcher_module, "CHEAP_MASK_S", 0.0)
    costly = suspects(guides, [PERSON, AMBIGUOUS])
    guides.masks.fill(costly, mask_GW)
    assert ["too ambiguous" in (matcher.error or "") for matcher in costly] == [True, True]
    assert not mask_GW.any()


def test_tokens_that_a_preemption_left_to_be_read_are_no_offence(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "[" + ",".join(str(number) for number in range(700))
    token_ids = [TokenId(token_id) for token_id in tiny_tokenizer().encode(text)]
    assert len(token_ids) > 1000
    numbers = JsonSchema({"type": "array", "items": {"type": "integer"}}, compact=True)
    resumed, stepped = tiny_guides().matcher(numbers, token_ids), tiny_guides().matcher(numbers, [])
    for token_id in token_ids:
        stepped.append(token_id)
        stepped.inner.consume_tokens([*stepped.take_unread()])
    monkeypatch.setattr(matcher_module, "MAX_FILL_S", 0.0)
    monkeypatch.setattr(matcher_module, "CHEAP_MASK_S", 0.0)
    monkeypatch.setattr(matcher_module, "MAX_MASK_S", 1000.0)
    assert np.array_equal(mask_of(tiny_guides(), resumed), mask_of(tiny_guides(), stepped))
    assert (resumed.error, resumed.is_suspect) == (None, False)


def test_forced_tokens_come_so_many_at_a_time() -> None:
    matcher = tiny_guides().matcher(Regex("[ab]" + "xyz " * 300 + "[cd]"), [TokenId(tiny_tokenizer().encode("a")[0])])
    forced = matcher.force(10_000)
    assert len(forced) == MAX_FORCED_TOKENS
    assert len(matcher.force(10)) == 10
    assert tiny_tokenizer().decode(forced) == ("xyz " * 300)[: len(tiny_tokenizer().decode(forced))]


def test_a_very_long_text_without_a_choice_is_followed_token_by_token() -> None:
    matcher = tiny_guides().matcher(Regex("x" * (MAX_FORCED_BYTES + 1)), [])
    assert matcher.force(10_000) == []
    token_id = allowed(tiny_guides(), matcher)[0]
    matcher.append(token_id)
    assert len(matcher.force(10_000)) == MAX_FORCED_TOKENS


def test_who_takes_too_long_to_force_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matcher_module, "MAX_MASK_S", -1.0)
    matcher = tiny_guides().matcher(Choices(("red", "green")), [])
    assert matcher.force(10) == []
    assert "too ambiguous" in (matcher.error or "")
