from collections.abc import Sequence

import pytest

from triode.cache.config import CacheConfig
from triode.cache.manager import CacheManager
from triode.cache.messages import (
    BlockCopy,
    Clear,
    Launched,
    Match,
    MatchRow,
    Pin,
    Release,
    ReleaseRow,
    Reserve,
    Reserved,
    ReserveRow,
    Unpin,
)
from triode.cache.recorder import Recorder
from triode.ids import BlockId, RequestId, SequenceId, StepId, TokenId, pack_tokens

NOBODY = RequestId("nobody")


def tokens(num: int, first: int = 0) -> tuple[TokenId, ...]:
    return tuple(map(TokenId, range(first, first + num)))


class Driver:
    """Short words for the messages; remembers how far each sequence has computed and the tables it was given."""

    def __init__(self, capacity_blocks: int = 20, config: CacheConfig | None = None) -> None:
        self.manager = CacheManager(capacity_blocks + 1, config or CacheConfig())
        self.now_s = 0.0
        self.num_computed: dict[int, int] = {}
        self.tables: dict[int, list[BlockId]] = {}
        self.step_id = 0

    def match(
        self,
        sequence_id: int,
        token_ids: Sequence[TokenId],
        *,
        namespace: bytes = b"",
        use_cached: bool = True,
        fork_of: int | None = None,
        num_prompt_tokens: int | None = None,
    ) -> int:
        row = MatchRow(
            SequenceId(sequence_id),
            pack_tokens(token_ids),
            num_prompt_tokens or len(token_ids),
            namespace,
            use_cached,
            None if fork_of is None else SequenceId(fork_of),
        )
        (num_cached,) = self.manager.match(Match((row,), self.now_s)).num_cached_tokens
        self.num_computed[sequence_id] = num_cached
        return num_cached

    def step(
        self, rows: dict[int, int], victims: Sequence[int] = (), max_victims: int = 99, *, is_launched: bool = True
    ) -> Reserved:
        """`rows`: how many tokens each sequence has after the step."""
        reserve = Reserve(
            StepId(self.step_id),
            tuple(
                ReserveRow(SequenceId(sequence_id), self.num_computed[sequence_id], end, end, max_victims)
                for sequence_id, end in rows.items()
            ),
            tuple(map(SequenceId, victims)),
            self.now_s,
        )
        self.step_id += 1
        reserved = self.manager.reserve(reserve)
        self.manager.check_integrity()
        for (sequence_id, end), is_granted in zip(rows.items(), reserved.granted, strict=True):
            if is_granted:
                self.num_computed[sequence_id] = end
                if is_launched:
                    self.launch(sequence_id, end)
        for change in reserved.tables:
            self.tables.setdefault(change.sequence_id, [])[change.first_block :] = change.block_ids
        return reserved

    def launch(self, sequence_id: int, num_tokens: int) -> None:
        """A step that computes so many tokens is on its way."""
        self.manager.launched(Launched((SequenceId(sequence_id),), (num_tokens,)))

    def run(
        self, sequence_id: int, token_ids: Sequence[TokenId], *, namespace: bytes = b"", use_cached: bool = True
    ) -> int:
        """Match and compute all tokens in one step; how many were cached."""
        num_cached = self.match(sequence_id, token_ids, namespace=namespace, use_cached=use_cached)
        assert self.step({sequence_id: len(token_ids)}).granted == (True,)
        return num_cached

    def run_over(self, sequence_id: int, victim: int) -> None:
        """Compute a token of its own in the room of a victim."""
        self.match(sequence_id, tokens(1, first=900))
        assert self.step({sequence_id: 1}, victims=[victim]).preempted == (victim,)

    def release(self, sequence_id: int, token_ids: Sequence[TokenId] = ()) -> None:
        row = ReleaseRow(SequenceId(sequence_id), pack_tokens(token_ids))
        self.manager.release(Release((row,), self.now_s))
        self.manager.check_integrity()

    def remember(self, token_ids: Sequence[TokenId], sequence_id: int = 1000, namespace: bytes = b"") -> None:
        self.run(sequence_id, token_ids, namespace=namespace)
        self.release(sequence_id, token_ids)

    def cached(self, token_ids: Sequence[TokenId], namespace: bytes = b"") -> int:
        """How many of the tokens a new request finds."""
        num_cached = self.match(2000, [*token_ids, TokenId(0)], namespace=namespace)
        self.release(2000)
        return num_cached

    @property
    def num_free(self) -> int:
        return self.manager.statistics().num_free_blocks


# Sharing


def test_a_prompt_is_found_once_the_step_that_computes_it_was_launched_and_not_in_that_step() -> None:
    driver = Driver()
    driver.match(1, tokens(40))
    driver.step({1: 40}, is_launched=False)
    assert driver.cached(tokens(40)) == 0
    driver.launch(1, 40)
    assert driver.cached(tokens(40)) == 32


def test_prompt_blocks_whose_step_was_reserved_and_never_launched_are_not_remembered() -> None:
    driver = Driver()
    driver.match(1, tokens(48))
    driver.step({1: 16})
    driver.step({1: 48}, is_launched=False)
    driver.step({})
    assert driver.cached(tokens(48)) == 16
    driver.release(1, tokens(16))
    assert driver.cached(tokens(48)) == 16


def test_generated_tokens_are_not_found_before_the_release() -> None:
    driver = Driver()
    driver.match(1, tokens(40), num_prompt_tokens=20)
    driver.step({1: 40})
    assert driver.cached(tokens(40)) == 16


def test_a_launch_of_a_sequence_without_a_table_is_accepted() -> None:
    driver = Driver(capacity_blocks=3)
    driver.launch(7, 40)
    driver.run(1, tokens(40))
    driver.run_over(2, victim=1)
    driver.launch(1, 40)
    driver.manager.check_integrity()
    assert driver.manager.statistics().num_cached_blocks == 2


def test_what_was_computed_before_a_preemption_is_not_remembered_without_its_blocks() -> None:
    driver = Driver(capacity_blocks=3)
    driver.match(1, tokens(40), num_prompt_tokens=5)
    driver.step({1: 40})
    driver.run_over(2, victim=1)
    driver.release(2)
    driver.match(1, tokens(40), num_prompt_tokens=5)
    driver.step({1: 5})
    driver.release(1, tokens(40))
    assert driver.cached(tokens(40)) == 0


def test_at_least_the_last_token_is_left_to_compute() -> None:
    driver = Driver()
    driver.remember(tokens(32))
    assert driver.run(1, tokens(32)) == 16
    assert driver.run(2, tokens(33)) == 32


def test_generated_tokens_are_found_after_the_release_and_those_past_a_stop_are_not() -> None:
    driver = Driver()
    driver.run(1, tokens(20))
    driver.step({1: 60})
    driver.release(1, tokens(50))
    assert driver.cached(tokens(64)) == 48


def test_nobody_finds_the_blocks_of_another_namespace() -> None:
    driver = Driver()
    driver.remember(tokens(32), namespace=b"mine")
    assert driver.cached(tokens(32), b"yours") == 0
    assert driver.cached(tokens(32), b"mine") == 32


def test_a_sequence_that_must_compute_everything_matches_nothing_and_is_found_by_others() -> None:
    driver = Driver()
    driver.remember(tokens(16))
    assert driver.run(1, tokens(48), use_cached=False) == 0
    driver.step({1: 49})
    assert driver.cached(tokens(48)) == 48


def test_a_shared_prefix_is_stored_once() -> None:
    driver = Driver()
    driver.remember(tokens(64))
    driver.run(1, tokens(70))
    driver.run(2, tokens(75))
    assert driver.tables[1][:4] == driver.tables[2][:4]
    assert driver.num_free == 20 - 4 - 1 - 1


def test_without_the_prefix_cache_nothing_is_found_and_all_blocks_are_free_after_the_release() -> None:
    driver = Driver(config=CacheConfig(prefix_cache=False))
    driver.remember(tokens(64))
    assert driver.cached(tokens(64)) == 0
    assert driver.num_free == 20


def test_a_preempted_sequence_finds_its_own_prompt_again() -> None:
    driver = Driver(capacity_blocks=4)
    driver.run(1, tokens(34))
    driver.step({1: 35})
    driver.match(2, tokens(17, first=500))
    assert driver.step({2: 17}, victims=[1]).preempted == (1,)
    assert driver.match(1, tokens(35), num_prompt_tokens=34) == 32


# Samples of one request


def test_a_fork_shares_the_whole_prompt_and_pays_one_copy() -> None:
    driver = Driver()
    driver.run(1, tokens(40))
    assert driver.match(2, tokens(40), fork_of=1) == 39
    reserved = driver.step({2: 40})
    assert reserved.copies == (BlockCopy(driver.tables[1][2], driver.tables[2][2]),)
    assert driver.tables[1][:2] == driver.tables[2][:2]
    assert driver.tables[1][2] != driver.tables[2][2]


def test_every_writer_but_the_last_owner_copies_a_partial_block() -> None:
    driver = Driver()
    driver.run(1, tokens(40))
    driver.match(2, tokens(40), fork_of=1)
    driver.match(3, tokens(40), fork_of=1)
    reserved = driver.step({1: 41, 2: 40, 3: 40})
    assert [copy.target for copy in reserved.copies] == [driver.tables[1][2], driver.tables[2][2]]
    assert len({driver.tables[sequence_id][2] for sequence_id in (1, 2, 3)}) == 3


def test_a_remembered_block_is_copied_before_its_last_position_is_written_again() -> None:
    driver = Driver()
    driver.run(1, tokens(32))
    driver.step({1: 33})
    remembered = driver.tables[1][1]
    assert driver.match(2, tokens(32), fork_of=1) == 31
    assert driver.step({2: 32}).copies == (BlockCopy(remembered, driver.tables[2][1]),)
    assert driver.cached(tokens(32)) == 32


def test_a_fork_of_a_sequence_that_has_not_computed_the_prompt_is_an_ordinary_match() -> None:
    driver = Driver()
    driver.remember(tokens(16))
    driver.match(1, tokens(40))
    assert driver.match(2, tokens(40), fork_of=1) == 16
    assert driver.match(3, tokens(40), fork_of=77) == 16
    driver.run(4, tokens(41, first=900))
    assert driver.match(3, tokens(40), fork_of=4) == 16


def test_a_fork_that_must_compute_everything_shares_nothing() -> None:
    driver = Driver()
    driver.run(1, tokens(40))
    assert driver.match(2, tokens(40), fork_of=1, use_cached=False) == 0


# Room


def test_a_decode_within_its_block_changes_nothing() -> None:
    driver = Driver()
    driver.run(1, tokens(20))
    reserved = driver.step({1: 21})
    assert reserved.granted == (True,)
    assert not reserved.tables
    assert not reserved.copies


def test_a_row_gets_all_it_needs_or_nothing() -> None:
    driver = Driver(capacity_blocks=3)
    driver.run(1, tokens(16))
    driver.match(2, tokens(40, first=100))
    reserved = driver.step({2: 40})
    assert reserved.granted == (False,)
    assert not reserved.tables
    assert driver.num_free == 2


def test_the_least_recently_used_prefix_goes_first_and_its_end_before_its_start() -> None:
    driver = Driver(capacity_blocks=5)
    driver.remember(tokens(32, first=100))
    driver.remember(tokens(32, first=200))
    assert driver.cached(tokens(32, first=100)) == 32
    driver.remember(tokens(32, first=300))
    assert driver.cached(tokens(32, first=200)) == 16
    assert driver.cached(tokens(32, first=100)) == 32
    assert driver.manager.statistics().num_evicted_blocks == 1


def test_victims_go_in_order_no_more_than_needed_and_no_more_than_the_row_may() -> None:
    driver = Driver(capacity_blocks=3)
    for sequence_id in (1, 2, 3):
        driver.run(sequence_id, tokens(9, first=100 * sequence_id))
    driver.match(4, tokens(9, first=900))
    assert driver.step({4: 9}, victims=[3, 2], max_victims=0).granted == (False,)
    driver.match(4, tokens(9, first=900))
    reserved = driver.step({4: 9}, victims=[3, 2], max_victims=2)
    assert reserved.granted == (True,)
    assert reserved.preempted == (3,)


def test_nobody_is_preempted_for_a_row_that_is_refused_all_the_same() -> None:
    driver = Driver(capacity_blocks=4)
    driver.run(1, tokens(32))
    driver.run(2, tokens(16, first=100))
    driver.match(3, tokens(64, first=200))
    reserved = driver.step({3: 64}, victims=[2])
    assert reserved.granted == (False,)
    assert reserved.preempted == ()


def test_a_row_granted_before_is_never_a_victim_and_a_victim_is_not_granted_after() -> None:
    driver = Driver(capacity_blocks=3)
    driver.run(1, tokens(16))
    driver.run(2, tokens(16, first=100))
    driver.run(3, tokens(16, first=200))
    reserved = driver.step({1: 17, 2: 17, 3: 17}, victims=[1, 2, 3])
    assert reserved.granted == (True, False, False)
    assert reserved.preempted == (2,)


def test_a_match_held_for_a_later_row_yields_before_a_running_sequence_is_preempted() -> None:
    driver = Driver(capacity_blocks=3)
    driver.remember(tokens(16, first=100))
    driver.run(1, tokens(16))
    driver.run(2, tokens(9, first=300))
    assert driver.match(3, tokens(17, first=100)) == 16
    reserved = driver.step({1: 17, 3: 17}, victims=[2])
    assert reserved.granted == (True, False)
    assert reserved.preempted == ()


def test_a_held_match_that_the_next_reserve_does_not_name_is_dropped() -> None:
    driver = Driver()
    driver.remember(tokens(32))
    driver.match(1, tokens(40))
    assert driver.manager.statistics().num_used_blocks == 2
    driver.step({})
    assert driver.manager.statistics().num_used_blocks == 0
    assert driver.run(1, tokens(40)) == 32


# Forgetting


def test_an_expired_prefix_is_not_found_although_nothing_else_has_happened() -> None:
    driver = Driver(config=CacheConfig(prefix_cache_ttl_s=10.0))
    driver.remember(tokens(32))
    driver.now_s = 9.0
    assert driver.cached(tokens(32)) == 32
    driver.now_s = 18.0
    assert driver.cached(tokens(32)) == 32, "the use at 9 s did not count"
    assert driver.manager.statistics(27.0).num_cached_blocks == 2
    statistics = driver.manager.statistics(28.0)
    assert statistics.num_free_blocks == 20
    assert statistics.num_expired_blocks == 2


def test_blocks_in_a_table_do_not_expire() -> None:
    driver = Driver(config=CacheConfig(prefix_cache_ttl_s=10.0))
    driver.remember(tokens(32))
    driver.run(1, tokens(40))
    driver.now_s = 100.0
    assert driver.cached(tokens(32)) == 32


def test_a_pinned_prefix_outlasts_expiry_clear_and_pressure() -> None:
    driver = Driver(capacity_blocks=4, config=CacheConfig(prefix_cache_ttl_s=10.0))
    driver.remember(tokens(32))
    assert driver.manager.pin(Pin(NOBODY, tokens(40), b"", 0.0)).num_tokens == 32
    driver.now_s = 100.0
    assert driver.manager.clear(Clear(NOBODY)).num_tokens == 0
    driver.match(1, tokens(48, first=500))
    assert driver.step({1: 48}).granted == (False,)
    assert driver.cached(tokens(32)) == 32
    assert driver.manager.statistics().num_pinned_blocks == 2


def test_unpin_undoes_one_pin() -> None:
    driver = Driver()
    driver.remember(tokens(32))
    unpin = Unpin(NOBODY, tokens(48), b"", 0.0)
    for _ in range(2):
        driver.manager.pin(Pin(NOBODY, tokens(48), b"", 0.0))
    driver.remember(tokens(48))
    assert driver.manager.unpin(unpin).num_tokens == 32
    assert driver.manager.clear(Clear(NOBODY)).num_tokens == 16
    assert driver.manager.unpin(unpin).num_tokens == 32
    assert driver.manager.unpin(unpin).num_tokens == 0
    assert driver.manager.clear(Clear(NOBODY)).num_tokens == 32


def test_a_pin_of_tokens_that_are_not_cached_pins_nothing() -> None:
    assert Driver().manager.pin(Pin(NOBODY, tokens(48), b"", 0.0)).num_tokens == 0


# Statistics and misuse


def test_hits_are_counted_when_a_sequence_is_admitted() -> None:
    driver = Driver()
    driver.remember(tokens(32))
    driver.match(1, tokens(64))
    driver.step({})
    driver.run(1, tokens(64))
    statistics = driver.manager.statistics()
    assert (statistics.num_query_tokens, statistics.num_hit_tokens) == (96, 32)


def test_a_release_of_an_unknown_sequence_is_accepted() -> None:
    driver = Driver()
    driver.release(7)
    driver.match(7, tokens(3))
    driver.release(7)
    assert driver.num_free == 20
    assert driver.manager.statistics().num_sequences == 0


def test_a_sequence_with_a_table_is_not_matched_again() -> None:
    driver = Driver()
    driver.run(1, tokens(3))
    with pytest.raises(ValueError, match="sequence_id must be of a sequence without a table, got 1"):
        driver.match(1, tokens(3))


def test_a_row_of_a_sequence_that_was_never_matched_is_refused() -> None:
    driver = Driver()
    driver.num_computed[5] = 0
    with pytest.raises(ValueError, match="sequence_id must be of a matched sequence, got 5"):
        driver.step({5: 3})


def test_a_row_that_starts_beyond_what_it_has_reserved_is_refused() -> None:
    driver = Driver()
    driver.match(1, tokens(40))
    driver.num_computed[1] = 16
    with pytest.raises(ValueError, match="num_computed_tokens must be <= 0"):
        driver.step({1: 40})


def test_a_match_without_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match=r"num_prompt_tokens must be in 1\.\.0"):
        Driver().match(1, ())


def test_what_a_release_left_to_do_is_seen_by_nobody() -> None:
    manager = CacheManager(8, CacheConfig(block_size_tokens=16))
    tokens = tuple(map(TokenId, range(40)))
    packed = pack_tokens(tokens)
    manager.match(Match((MatchRow(SequenceId(0), packed, 40, b""),), 0.0))
    manager.reserve(Reserve(StepId(0), (ReserveRow(SequenceId(0), 0, 40, 40, 0),), (), 0.0))
    manager.release(Release((ReleaseRow(SequenceId(0), packed),), 0.0))
    assert manager.is_unsettled
    assert manager.statistics().num_used_blocks == 0
    assert manager.match(Match((MatchRow(SequenceId(1), packed, 40, b""),), 0.0)).num_cached_tokens == (32,)
    manager.release(Release((ReleaseRow(SequenceId(1), b""),), 0.0))
    assert manager.clear(Clear(RequestId("clear"))).num_tokens == 32


def test_whatever_fails_in_a_release_fails_for_everybody_who_asks_and_takes_no_block_with_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def remember(*_: object) -> None:
        raise ZeroDivisionError

    driver = Driver()
    driver.match(1, tokens(40))
    driver.step({1: 40})
    driver.manager.release(Release((ReleaseRow(SequenceId(1), pack_tokens(tokens(40))),), 0.0))
    with monkeypatch.context() as patch:
        patch.setattr(Recorder, "remember", remember)
        for _ in range(2):
            with pytest.raises(ZeroDivisionError):
                driver.manager.statistics()
    assert driver.manager.statistics().num_used_blocks == 0
    driver.manager.check_integrity()
