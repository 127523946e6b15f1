import pytest
from hypothesis import given
from hypothesis import strategies as st

from triode.cache.chain import TokenChain
from triode.ids import TokenId, pack_tokens

Tokens = tuple[TokenId, ...]
some_tokens = st.lists(st.integers(0, 2**32 - 1).map(TokenId), max_size=70).map(tuple)


def chain(tokens: Tokens, namespace: bytes = b"") -> TokenChain:
    made = TokenChain(namespace, 16)
    made.extend(pack_tokens(tokens))
    return made


@given(tokens=some_tokens, cut=st.integers(0, 70))
def test_names_do_not_depend_on_how_the_tokens_became_known(tokens: Tokens, cut: int) -> None:
    whole, grown = chain(tokens), chain(tokens[:cut])
    for index in range(grown.num_full_blocks):
        grown.digest(index)
    grown.extend(pack_tokens(tokens))
    assert [grown.digest(i) for i in range(len(tokens) // 16)] == [whole.digest(i) for i in range(len(tokens) // 16)]


@given(left=some_tokens, right=some_tokens)
def test_blocks_have_one_name_exactly_when_all_tokens_up_to_them_agree(left: Tokens, right: Tokens) -> None:
    for index in range(min(len(left), len(right)) // 16):
        end = (index + 1) * 16
        assert (chain(left).digest(index) == chain(right).digest(index)) == (left[:end] == right[:end])


@given(tokens=some_tokens)
def test_blocks_in_a_row_are_those_asked_for_one_by_one(tokens: Tokens) -> None:
    asked = chain(tokens)
    assert list(asked.blocks(asked.num_full_blocks)) == [asked.tokens(i) for i in range(asked.num_full_blocks)]


def test_another_namespace_means_other_names() -> None:
    tokens = tuple(map(TokenId, range(16)))
    assert chain(tokens, b"a").digest(0) != chain(tokens, b"b").digest(0)


def test_a_namespace_that_imitates_a_block_does_not_get_its_name() -> None:
    victim = chain(tuple(map(TokenId, range(48))), b"victim")
    thief = chain(tuple(map(TokenId, range(32, 48))), victim.digest(0) + victim.tokens(1))
    assert thief.digest(0) != victim.digest(2)


def test_fewer_tokens_than_are_known_change_nothing() -> None:
    known = chain(tuple(map(TokenId, range(40))))
    known.extend(pack_tokens(tuple(map(TokenId, range(3)))))
    assert known.num_full_blocks == 2


def test_tokens_that_contradict_the_known_ones_are_refused() -> None:
    known = chain((TokenId(1), TokenId(2)))
    with pytest.raises(ValueError, match="tokens must continue the sequence's 2 known tokens"):
        known.extend(pack_tokens((TokenId(1), TokenId(3), TokenId(4))))
