"""What masks let through: everything that a guide describes, and nothing else.

`data/json_schema_suite.json` is the part of the JSON-Schema-Test-Suite for draft 2020-12 that refers to no other document
(https://github.com/json-schema-org/JSON-Schema-Test-Suite, MIT, see the licence beside it).
"""

import json
import re
import threading
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import hypothesis.strategies as st
import jsonschema
import numpy as np
import pytest
from hypothesis import example, given, settings
from llguidance import LLTokenizer
from tokenizers import Tokenizer as Backend
from tokenizers.normalizers import NFC

from guides import DIGITS, EOS, grow_up_to, tiny_guides, tiny_tokenizer
from trained_tokenizers import byte_fallback_bpe, byte_fallback_from_gguf, byte_level_bpe
from triode.errors import EngineBusy
from triode.ids import TokenId
from triode.models import grammar, prototypes
from triode.models.grammar import GuideCompiler, check_guide
from triode.models.guide import MAX_OPTIONAL, Choices, Grammar, Guide, JsonObject, JsonSchema, Regex
from triode.models.matcher import Matcher
from triode.models.prototypes import FEW_SHARERS, MAX_SHARERS, CompiledGuide, Prototype, compile_prototype
from triode.models.tokenizer import Tokenizer
from triode.models.vocabulary import Vocabulary
from walks import accepts, allowed, mask_of, walk

SUITE = json.loads((Path(__file__).parents[1] / "data/json_schema_suite.json").read_text(encoding="utf-8"))

NESTED = {
    "type": "object",
    "properties": {
        "título": {"type": "string", "maxLength": 8},
        "kind": {"enum": ["α", "b", 3, None]},
        "scores": {"type": "array", "items": {"type": "number", "minimum": -1, "maximum": 1}, "maxItems": 3},
        "born": {"type": "string", "format": "date"},
        "home": {
            "type": "object",
            "properties": {"zip": {"type": "string", "pattern": "^[0-9]{5}$"}, "is_own": {"type": "boolean"}},
            "required": ["zip"],
            "additionalProperties": False,
        },
    },
    "required": ["título", "kind", "scores", "born", "home"],
    "additionalProperties": False,
}


@cache
def compiled() -> list[dict[str, Any]]:
    """The groups of the suite whose schemas can be followed."""
    return [group for group in SUITE if _compiles(JsonSchema(group["schema"]))]


def _compiles(guide: Guide) -> bool:
    try:
        tiny_guides().check(guide)
    except ValueError:
        return False
    return True


def fresh_guides() -> GuideCompiler:
    guides = GuideCompiler(tiny_tokenizer(), 499, [EOS])
    guides._vocabulary = tiny_guides()._vocabulary
    return guides


def drawn(guide: Guide, seed: int, max_tokens: int = 60) -> str | None:
    output = walk(tiny_guides(), guide, tiny_tokenizer(), Random(seed), max_tokens)
    return None if output is None else output.decode()


def takes(guide: Guide, text: str) -> bool:
    return accepts(tiny_guides(), guide, tiny_tokenizer().encode(text))


def test_no_invalid_instance_of_the_suite_passes_and_most_valid_ones_do() -> None:
    assert len(compiled()) >= 140
    instances = [(group, instance, is_valid) for group in compiled() for instance, is_valid in group["tests"]]
    passed = [takes(JsonSchema(group["schema"]), json.dumps(instance)) for group, instance, _ in instances]
    assert [
        (group["about"], instance)
        for (group, instance, is_valid), has_passed in zip(instances, passed, strict=True)
        if has_passed and not is_valid
    ] == []
    # Of valid ones, some spellings are never written: 1.0 for an integer, properties out of the schema's order.
    num_valid = sum(is_valid for _, _, is_valid in instances)
    assert sum(passed) >= 0.93 * num_valid


@pytest.mark.parametrize("compact", [False, True])
def test_what_is_drawn_from_a_schema_of_the_suite_validates(compact: bool) -> None:
    num_ended = 0
    for number, group in enumerate(compiled()):
        text = drawn(JsonSchema(group["schema"], compact=compact), seed=number)
        if text is not None:
            num_ended += 1
            jsonschema.Draft202012Validator(group["schema"]).validate(json.loads(text))
    assert num_ended > 0.8 * len(compiled())


@pytest.mark.parametrize("seed", range(20))
def test_what_is_drawn_from_a_nested_schema_validates(seed: int) -> None:
    text = drawn(JsonSchema(NESTED), seed, max_tokens=300)
    assert text is not None
    checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
    jsonschema.Draft202012Validator(NESTED, format_checker=checker).validate(json.loads(text))


@pytest.mark.parametrize("seed", range(10))
def test_any_json_object_parses(seed: int) -> None:
    text = drawn(JsonObject(), seed, max_tokens=200)
    assert text is None or isinstance(json.loads(text), dict)


UNSUPPORTED: list[tuple[dict[str, object], str]] = [
    ({"type": "array", "uniqueItems": True}, "uniqueItems"),
    ({"not": {"type": "null"}}, "not"),
    ({"if": {}, "then": {}}, "if"),
    ({"oneOf": [{"type": "string"}, {"minLength": 3}]}, "oneOf"),
    ({"type": "string", "format": "made-up"}, "made-up"),
    ({"$ref": "https://example.org/schema"}, "https://example.org/schema"),
    ({"type": "object", "uniqueItems": True, "x-guidance": {"lenient": True}}, "uniqueItems"),
    ({"oneOf": [{"type": "string"}, {"minLength": 3}], "x-guidance": {"coerce_one_of": True}}, "oneOf"),
    ({"type": "made-up"}, "made-up"),
    ({"allOf": [{"type": "string"}, {"type": "number"}]}, "[Uu]nsatisfiable"),
]


@pytest.mark.parametrize(("schema", "reason"), UNSUPPORTED, ids=[reason for _, reason in UNSUPPORTED])
def test_a_keyword_that_cannot_be_enforced_is_refused_by_name(schema: dict[str, object], reason: str) -> None:
    with pytest.raises(ValueError, match=f"(?s)^guide cannot be compiled: .*{reason}"):
        tiny_guides().check(JsonSchema(schema))


@pytest.mark.parametrize(
    ("guide", "reason"),
    [
        (Regex("(?=a)b"), "look-around"),
        (Regex("(" * 5000 + "a" + ")" * 5000), "nest"),
        (Grammar("start: missing"), "missing"),
        (Grammar('{"grammars": [{"json_schema": {}}]}'), "expecting rule"),
        (Grammar("start: " + "(" * 5000 + '"a"' + ")" * 5000), "nested"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_a_guide_that_is_no_grammar_is_refused_with_the_reason(guide: Guide, reason: str) -> None:
    with pytest.raises(ValueError, match=f"(?s)^guide cannot be compiled: .*{reason}"):
        tiny_guides().check(guide)


texts = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12)


@settings(max_examples=40, deadline=None)
@given(st.lists(texts, min_size=1, max_size=8), st.integers(0, 2**32))
def test_an_output_is_one_of_the_choices_and_each_can_be_one(options: list[str], seed: int) -> None:
    guide = Choices(tuple(options))
    assert drawn(guide, seed, max_tokens=100) in options
    assert all(takes(guide, option) for option in options)
    assert not takes(guide, "".join(options) + "?")


letters = st.sampled_from("abc")
patterns = st.recursive(
    letters,
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map(lambda pair: f"(?:{pair[0]}|{pair[1]})"),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "{2}", "{1,3}"])).map(lambda pair: f"(?:{pair[0]}){pair[1]}"),
    ),
    max_leaves=6,
)


@settings(max_examples=40, deadline=None)
@given(patterns, st.integers(0, 2**32), st.text("abc", max_size=6))
def test_an_output_matches_its_expression_from_end_to_end(pattern: str, seed: int, text: str) -> None:
    guide = Regex(pattern)
    output = drawn(guide, seed)
    assert output is None or re.fullmatch(pattern, output)
    if text:
        assert takes(guide, text) == bool(re.fullmatch(pattern, text))


@pytest.mark.parametrize("compact", [True, False])
def test_as_many_optional_properties_as_are_accepted_can_be_followed(compact: bool) -> None:
    properties = {f"p{index}": {"enum": [1]} for index in range(MAX_OPTIONAL)}
    schema = {"type": "object", "properties": properties, "additionalProperties": False}
    guide = JsonSchema({"type": "array", "items": {"anyOf": [schema, {"type": "null"}]}}, compact=compact)
    value = [None, dict.fromkeys(list(properties)[::40], 1)]
    token_ids = tiny_tokenizer().encode(json.dumps(value, separators=(",", ":")))
    assert accepts(tiny_guides(), guide, token_ids)


def test_a_grammar_derives_what_no_expression_does() -> None:
    guide = Grammar('start: "<" start ">" | "x"')
    assert takes(guide, "<<<x>>>")
    assert not takes(guide, "<<<x>>")


def test_white_space_is_bounded_or_absent() -> None:
    assert takes(JsonObject(), '{ "a" :\n\t1 }')
    assert not takes(JsonObject(), '{"a":' + " " * 41 + "1}")
    assert takes(JsonObject(compact=True), '{"a":[1,2]}')
    assert not takes(JsonObject(compact=True), '{"a": 1}')


def test_special_tokens_are_no_text() -> None:
    special = tiny_tokenizer().special_ids - {EOS}
    assert special.isdisjoint(allowed(tiny_guides(), tiny_guides().matcher(Regex("(?s:.*)"), [])))


def test_past_its_end_a_sequence_may_only_end() -> None:
    matcher = tiny_guides().matcher(Choices(("ab",)), [TokenId(token) for token in tiny_tokenizer().encode("ab")])
    assert allowed(tiny_guides(), matcher) == [EOS]
    for token_id in (EOS, 77, 78):
        matcher.append(TokenId(token_id))
    assert allowed(tiny_guides(), matcher) == [EOS]
    assert matcher.error is None


def test_compiled_guides_are_kept_up_to_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar, "MAX_KEPT_BYTES", 1000)
    guides = fresh_guides()
    first = guides._find(Regex("first"))
    assert guides._find(Regex("first")) is first
    for number in range(30):
        guides._find(Regex(f"number {number}"))
        guides._find(Regex("first"))
    assert guides._find(Regex("first")) is first
    assert guides._kept_bytes == sum(compiled.num_bytes for compiled in guides._compiled.values()) <= 1000
    assert len(guides._compiled) < 20


def test_a_guide_stays_compiled_while_a_request_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar, "MAX_KEPT_BYTES", 1000)
    guides = fresh_guides()
    compiled: list[Guide] = []

    def counted(guide: Guide, vocabulary: LLTokenizer) -> Prototype:
        compiled.append(guide)
        return compile_prototype(guide, vocabulary)

    monkeypatch.setattr(grammar, "compile_prototype", counted)
    for _ in range(2):
        guides.check(Regex("held"))
    for number in range(30):
        guides.check(Regex(f"number {number}"))
        guides.release(Regex(f"number {number}"))
    guides.release(Regex("held"))
    guides.check(Regex("number 0"))
    guides.matcher(Regex("held"), [])
    assert compiled.count(Regex("held")) == 1
    assert compiled.count(Regex("number 0")) == 2


SPENDING = Regex("(.*a.{0,20}){20}")
"""Its lexer has more to do for each token, and soon too much."""


def spend(guides: GuideCompiler, matcher: Matcher | None = None) -> None:
    matcher = matcher or guides.matcher(SPENDING, [])
    for token_id in 20 * tiny_tokenizer().encode("ab a"):
        matcher.append(TokenId(token_id))
        mask_of(guides, matcher)
    assert "lexer error" in (matcher.error or "")


def test_a_lexer_that_has_given_up_is_not_given_to_the_next_request() -> None:
    guides = fresh_guides()
    guides.check(SPENDING)
    assert allowed(guides, guides.matcher(SPENDING, []))
    spend(guides)
    # Where nobody has asked, in process mode, no less than where the check has found it.
    assert allowed(guides, guides.matcher(SPENDING, []))
    spend(guides)
    guides.check(SPENDING)
    assert not any(prototype.is_spent for prototype in guides._compiled[SPENDING].prototypes)


def test_a_lexer_that_has_given_up_fails_only_the_sequence_that_spent_it(monkeypatch: pytest.MonkeyPatch) -> None:
    # However busy the machine is.
    monkeypatch.setattr("triode.models.matcher.MAX_RENEWING_S", 60)
    grow_up_to(1, monkeypatch)
    guides = fresh_guides()
    guides.check(SPENDING)
    token_ids = [TokenId(token_id) for token_id in tiny_tokenizer().encode("ab a")]
    others = [guides.matcher(SPENDING, token_ids) for _ in range(MAX_SHARERS - 1)]
    masks = [mask_of(guides, matcher).copy() for matcher in others]
    compiled: list[int] = []

    def counted(guide: Guide, vocabulary: LLTokenizer) -> Prototype:
        compiled.append(1)
        return compile_prototype(guide, vocabulary)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grammar, "compile_prototype", counted)
        spend(guides)
        # Twice for the one that has spent it, and once for all the others.
        assert len(compiled) == 2
        together = np.zeros((len(others), guides.masks.num_words), np.int32)
        for matcher in others:
            matcher.append(token_ids[0])
            assert matcher.force(5) == []
        guides.masks.fill(others, together)
        assert len(compiled) == 3
    assert all(matcher.error is None for matcher in others)
    assert (together == together[0]).all()
    assert together[0].any()
    assert (np.array(masks) == masks[0]).all()


def test_beginning_again_has_a_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("triode.models.matcher.MAX_RENEWING_S", 0)
    guides = fresh_guides()
    guides.check(SPENDING)
    other = guides.matcher(SPENDING, [])
    spend(guides)
    assert not allowed(guides, other)
    assert "lexer error" in (other.error or "")


@pytest.mark.parametrize("num_requests", [1, MAX_SHARERS])
@pytest.mark.parametrize("comes_at_once", [True, False])
def test_few_sequences_share_a_lexer_at_a_time(
    num_requests: int, comes_at_once: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    grow_up_to(1, monkeypatch)
    guides = fresh_guides()
    matchers: list[Matcher] = []
    for number in range(4 * MAX_SHARERS):
        if number % num_requests == 0:
            guides.check(DIGITS, num_requests)
        if not comes_at_once:
            matchers.append(guides.matcher(DIGITS, []))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grammar, "compile_prototype", None)
        matchers += [guides.matcher(DIGITS, []) for _ in range(4 * MAX_SHARERS - len(matchers))]
    assert list(Counter(matcher.lexer for matcher in matchers).values()) == [MAX_SHARERS] * 4


def test_sequences_that_come_again_share_lexers_like_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a preemption, where nobody asks once more."""
    grow_up_to(1, monkeypatch)
    guides = fresh_guides()
    guides.check(DIGITS, MAX_SHARERS)
    matchers = [guides.matcher(DIGITS, []) for _ in range(2 * MAX_SHARERS)]
    assert list(Counter(matcher.lexer for matcher in matchers).values()) == [MAX_SHARERS] * 2


def test_a_spent_lexer_fails_few_others(monkeypatch: pytest.MonkeyPatch) -> None:
    # Nobody may begin again.
    monkeypatch.setattr("triode.models.matcher.MAX_RENEWING_S", 0)
    guides = fresh_guides()
    for _ in range(4 * MAX_SHARERS):
        guides.check(SPENDING)
    spender, *others = [guides.matcher(SPENDING, []) for _ in range(4 * MAX_SHARERS)]
    spend(guides, spender)
    guides.masks.fill(others, np.zeros((len(others), guides.masks.num_words), np.int32))
    failed = [matcher for matcher in others if matcher.error is not None]
    assert len(failed) < MAX_SHARERS
    assert all(matcher.lexer == spender.lexer for matcher in failed)


def test_sequences_that_begin_again_share_lexers_like_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("triode.models.matcher.MAX_RENEWING_S", 60)
    grow_up_to(1, monkeypatch)
    guides = fresh_guides()
    guides.check(SPENDING, 2 * MAX_SHARERS - 1)
    spender, *matchers = [guides.matcher(SPENDING, []) for _ in range(2 * MAX_SHARERS - 2)]
    lexers = {matcher.lexer for matcher in matchers}
    assert len(lexers) == 2
    spend(guides, spender)
    assert spender.lexer not in lexers
    guides.masks.fill(matchers, np.zeros((len(matchers), guides.masks.num_words), np.int32))
    assert all(matcher.error is None for matcher in matchers)
    shares = Counter(matcher.lexer for matcher in matchers)
    assert max(shares.values()) <= MAX_SHARERS
    sharers = {prototype.number: len(prototype.sharers) for prototype in guides._compiled[SPENDING].prototypes}
    assert sharers == shares


def test_a_lexer_is_kept_for_the_next_sequences_but_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    grow_up_to(1, monkeypatch)
    monkeypatch.setattr(prototypes, "MAX_GIVEN", 40)
    guides = fresh_guides()
    lexers: list[int] = []
    # They have ended, though their places in the batch are nobody's yet.
    ended: list[Matcher] = []
    for _ in range(20):
        for _ in range(4):
            guides.check(DIGITS)
        ended += [guides.matcher(DIGITS, []) for _ in range(4)]
        for _ in range(4):
            guides.release(DIGITS)
        lexers.append(ended[-1].lexer)
    assert list(Counter(lexers).values()) == [10, 10]


def test_a_guide_that_many_have_gets_a_lexer_for_every_few_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    grow_up_to(3, monkeypatch)
    guides = fresh_guides()
    matchers: list[Matcher] = []
    guides.check(DIGITS)
    for num_matchers, num_sharers in ((FEW_SHARERS, [4]), (12, [5, 4, 3]), (21, [7, 7, 7])):
        while len(matchers) < num_matchers:
            matchers.append(guides.matcher(DIGITS, []))
            grown(guides)
        prototypes = guides._compiled[DIGITS].prototypes
        assert [len(prototype.sharers) for prototype in prototypes] == num_sharers
    assert [matcher.lexer for matcher in matchers].count(prototypes[0].number) == 7


def grown(guides: GuideCompiler) -> None:
    """Wait for prototypes that are being made."""
    guides._growing.submit(int).result()


def test_the_next_requests_find_a_guide_grown(monkeypatch: pytest.MonkeyPatch) -> None:
    grow_up_to(3, monkeypatch)
    guides = fresh_guides()
    kept: list[Matcher] = []
    for _ in range(3):
        for _ in range(12):
            guides.check(DIGITS)
        kept += [guides.matcher(DIGITS, []) for _ in range(12)]
        grown(guides)
        prototypes = guides._compiled[DIGITS].prototypes
        for _ in range(12):
            guides.release(DIGITS)
        # From here on there are enough.
        monkeypatch.setattr(grammar, "compile_prototype", None)
    assert [prototype.num_given for prototype in prototypes] == [20, 8, 8]


def test_lexers_that_nobody_needs_are_bounded_together(monkeypatch: pytest.MonkeyPatch) -> None:
    grow_up_to(4, monkeypatch)
    monkeypatch.setattr(grammar, "MAX_SPARE", 5)
    guides = fresh_guides()
    for text in ("oldest", "older", "newest"):
        guides.check(Regex(text))
        matchers = [guides.matcher(Regex(text), []) for _ in range(4 * FEW_SHARERS)]
        grown(guides)
        assert len(matchers) == sum(len(prototype.sharers) for prototype in guides._compiled[Regex(text)].prototypes)
    assert [len(compiled.prototypes) for compiled in guides._compiled.values()] == [1, 3, 4]
    # What requests need stays.
    guides.check(Regex("oldest"), 10 * MAX_SHARERS)
    assert [len(compiled.prototypes) for compiled in guides._compiled.values()] == [3, 4, 11]


@pytest.mark.parametrize("max_spare", [0, 1, 3])
def test_growing_ends_where_others_are_used_meanwhile(max_spare: int, monkeypatch: pytest.MonkeyPatch) -> None:
    grow_up_to(4, monkeypatch)
    monkeypatch.setattr(grammar, "MAX_SPARE", max_spare)
    guides, others = fresh_guides(), Regex("others")
    guides.check(others)
    held = [guides.matcher(others, []) for _ in range(16)]
    grown(guides)
    compiled: list[Guide] = []

    def counted(guide: Guide, vocabulary: LLTokenizer) -> Prototype:
        compiled.append(guide)
        guides._find(others)
        return compile_prototype(guide, vocabulary)

    guides.check(DIGITS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grammar, "compile_prototype", counted)
        held += [guides.matcher(DIGITS, []) for _ in range(16)]
        grown(guides)
    assert 0 < compiled.count(DIGITS) <= prototypes.MAX_LEXERS
    # Spare ones of others have made room.
    assert [len(guides._compiled[guide].prototypes) for guide in (DIGITS, others)] == [1 + max_spare, 1]
    guides.close()


def test_growing_is_bounded_whatever_it_comes_to(monkeypatch: pytest.MonkeyPatch) -> None:
    grow_up_to(4, monkeypatch)
    monkeypatch.setattr(CompiledGuide, "is_crowded", True)
    guides = fresh_guides()
    guides.check(DIGITS)
    compiled: list[Guide] = []

    def counted(guide: Guide, vocabulary: LLTokenizer) -> Prototype:
        compiled.append(guide)
        assert len(compiled) < 20
        return compile_prototype(guide, vocabulary)

    monkeypatch.setattr(grammar, "compile_prototype", counted)
    guides.matcher(DIGITS, [])
    grown(guides)
    assert len(compiled) == prototypes.MAX_LEXERS
    guides.close()


def test_closing_ends_growing_which_can_begin_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    grow_up_to(4, monkeypatch)
    guides, begun, may_go_on = fresh_guides(), threading.Event(), threading.Event()

    def slow(guide: Guide, vocabulary: LLTokenizer) -> Prototype:
        begun.set()
        may_go_on.wait()
        return compile_prototype(guide, vocabulary)

    both = (DIGITS, Regex("waits"))
    for guide in both:
        guides.check(guide)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grammar, "compile_prototype", slow)
        held = [guides.matcher(guide, []) for guide in both for _ in range(16)]
        begun.wait()
        closing = threading.Thread(target=guides.close)
        closing.start()
        guides._is_closing.wait()
        may_go_on.set()
        closing.join()
    assert [len(guides._compiled[guide].prototypes) for guide in both] == [2, 1]
    for guide in both:
        held.append(guides.matcher(guide, []))
        grown(guides)
    assert [len(guides._compiled[guide].prototypes) for guide in both] == [4, 4]
    guides.close()


def test_an_exception_of_growing_rises_where_the_next_sequence_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    grow_up_to(4, monkeypatch)
    guides = fresh_guides()
    guides.check(DIGITS)

    def broken(guide: Guide, vocabulary: LLTokenizer) -> Prototype:
        raise MemoryError("a bug")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grammar, "compile_prototype", broken)
        held = [guides.matcher(DIGITS, []) for _ in range(FEW_SHARERS + 1)]
        grown(guides)
        guides.check(DIGITS)
        with pytest.raises(RuntimeError, match="could not be compiled once more") as raised:
            guides.matcher(DIGITS, [])
    assert isinstance(raised.value.__cause__, MemoryError)
    held.append(guides.matcher(DIGITS, []))
    grown(guides)
    assert len(guides._compiled[DIGITS].prototypes) == 2
    guides.close()


def test_few_guides_stay_compiled_that_nobody_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar, "MAX_UNHELD", 3)
    guides = fresh_guides()
    guides.check(Regex("held"))
    for number in range(10):
        guides.check(Regex(f"number {number}"))
        guides.release(Regex(f"number {number}"))
    assert list(guides._compiled) == [Regex(text) for text in ("held", "number 7", "number 8", "number 9")]
    assert guides._kept_bytes == sum(compiled.num_bytes for compiled in guides._compiled.values())


def test_guides_of_unfinished_requests_are_bounded_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar, "MAX_KEPT_BYTES", 400)
    guides = fresh_guides()
    big = [Regex(f"{letter}" * 100) for letter in "abc"]
    guides.check(big[0])
    guides.check(big[1])
    with pytest.raises(EngineBusy, match=r"guides of unfinished requests must have <= 400 bytes together; try again"):
        guides.check(big[2])
    guides.check(big[1])
    guides.release(big[0])
    guides.check(big[2])
    assert guides._held_bytes == sum(compiled.num_bytes for compiled in guides._compiled.values()) <= 400


def test_a_model_without_an_end_refuses_guides() -> None:
    with pytest.raises(ValueError, match="this model has no end-of-sequence token"):
        GuideCompiler(tiny_tokenizer(), 499, []).check(Regex("a"))
    with pytest.raises(ValueError, match="this runner has no tokenizer"):
        check_guide(None, Regex("a"))


def composing_byte_level() -> Backend:
    """As Qwen: it changes what it reads to composed characters."""
    backend = Backend.from_str(byte_level_bpe().to_str())
    backend.normalizer = NFC()
    return backend


@cache
def vocabulary_of(family: Callable[[], Backend]) -> Vocabulary:
    return Vocabulary(Tokenizer(family(), None, {}), EOS)


FAMILIES = [byte_level_bpe, byte_fallback_bpe, byte_fallback_from_gguf]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)
def test_masks_speak_of_the_text_that_every_family_of_tokenizers_decodes(family: Callable[[], Backend]) -> None:
    tokenizer = Tokenizer(family(), None, {})
    guides = GuideCompiler(tokenizer, tokenizer.vocab_size, [EOS])
    options = ("yes, it is", "l'élève  été", "日本\n語", "👩‍👩‍👧")
    for seed in range(12):
        random, matcher = Random(seed), guides.matcher(Choices(options), [])
        token_ids: list[TokenId] = []
        while (choice := random.choice(allowed(guides, matcher))) != EOS:
            token_ids.append(choice)
            matcher.append(choice)
        assert tokenizer.decode(token_ids) in options


@pytest.mark.parametrize("family", [*FAMILIES, composing_byte_level], ids=lambda family: family.__name__)
@settings(max_examples=25, deadline=None)
@given(st.text(st.characters(codec="utf-8"), max_size=12))
@example(" yes")
@example("e\u0301")
def test_a_vocabulary_spells_a_text_and_nothing_else(family: Callable[[], Backend], text: str) -> None:
    vocabulary = vocabulary_of(family)
    assert b"".join(vocabulary.tokens[token_id] for token_id in vocabulary(text)) == text.encode()
    assert set(vocabulary(text)).isdisjoint(vocabulary.special_token_ids)
