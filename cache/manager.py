"""Which sequence gets which block: the decisions of the KV cache.

Blocks are written by a single owner: a row that would write into a block with more references gets a copy first,
whoever the others are. So what the prefix tree remembers is never written again, nor is what another table reads.

A sequence's prompt blocks enter the tree when Launched says that the step that computes them is on its way, its other
blocks at its Release: whoever finds them reads them in a later step. Nobody waits for either message, and what they
leave to do takes half a millisecond for a long prompt: it is done when somebody asks for something, or when nobody has
anything else to do.

When room runs out, a row may take it from the matches held for rows behind it and then from the victims it was allowed.
What that would yield is worked out beforehand: nobody loses blocks for a row that is refused all the same.
"""

from collections import Counter, deque
from collections.abc import Iterable, Sequence

from triode.cache.blocks import BlockStore, Forecast
from triode.cache.chain import TokenChain
from triode.cache.config import CacheConfig
from triode.cache.messages import (
    BlockCopy,
    Clear,
    Launched,
    Match,
    Matched,
    MatchRow,
    Pin,
    Pinned,
    Release,
    ReleaseRow,
    Reserve,
    Reserved,
    ReserveRow,
    SequenceTable,
    Unpin,
)
from triode.cache.pins import Pins
from triode.cache.recorder import Recorder
from triode.cache.sequence import CachedSequence
from triode.cache.statistics import CacheStatistics
from triode.ids import TOKEN_BYTES, BlockId, SequenceId, TokenId, pack_tokens


class _Step:
    """What one Reserve has decided so far."""

    def __init__(self, reserve: Reserve) -> None:
        self.reserve = reserve
        self.granted: list[bool] = []
        self.preempted: list[SequenceId] = []
        # Sequences that lost their blocks to an earlier row.
        self.robbed: set[CachedSequence] = set()
        self.tables: list[SequenceTable] = []
        self.copies: list[BlockCopy] = []

    def answer(self) -> Reserved:
        return Reserved(
            self.reserve.step_id, tuple(self.granted), tuple(self.preempted), tuple(self.tables), tuple(self.copies)
        )


class CacheManager:
    """Answers the messages of `triode.cache.messages`; moves no memory itself."""

    def __init__(self, num_blocks: int, config: CacheConfig) -> None:
        """`num_blocks` counts block 0, which nobody gets."""
        self._block_size = config.block_size_tokens
        self._store = BlockStore(num_blocks, config.prefix_cache_ttl_s)
        self._recorder = Recorder(self._store, self._block_size, is_on=config.prefix_cache)
        self._pins = Pins(self._store)
        self._sequences: dict[SequenceId, CachedSequence] = {}
        self._held: dict[SequenceId, CachedSequence] = {}
        self._unsettled: deque[Launched | Release] = deque()
        self._num_query_tokens = 0
        self._num_hit_tokens = 0
        self._num_copied_blocks = 0
        self._num_preemptions = 0

    def match(self, match: Match) -> Matched:
        """Find each row's cached prefix and hold it. A row that was held already is matched anew.

        Raises ValueError for a row without tokens, of a sequence that is admitted, or that contradicts the tokens that
        the sequence is known to have.
        """
        self.settle()
        self._store.advance(match.now_s)
        return Matched(tuple(self._match_row(row) for row in match.rows))

    def reserve(self, reserve: Reserve) -> Reserved:
        """Give each row the blocks it needs, in order, all or nothing.

        Raises ValueError for a sequence that was never matched, or a row that starts beyond what it has reserved.
        """
        self.settle()
        self._store.advance(reserve.now_s)
        if self._held:
            self._drop_unnamed_holds(reserve.rows)
        step = _Step(reserve)
        sequences, references, block_size = self._sequences, self._store.num_references, self._block_size
        for index, row in enumerate(reserve.rows):
            sequence = sequences.get(row.sequence_id)
            if sequence is None:
                raise ValueError(f"sequence_id must be of a matched sequence, got {row.sequence_id}")
            first = row.num_computed_tokens // block_size
            # Nearly every row of nearly every step: a decode within a block of its own.
            if (
                row.num_table_tokens <= sequence.room_tokens
                and row.num_tokens <= (first + 1) * block_size
                and references[sequence.table[first]] == 1
            ):
                sequence.num_tokens = row.num_tokens
                sequence.granted_in = reserve.step_id
                step.granted.append(True)
            else:
                step.granted.append(self._serve(sequence, row, index, step))
        return step.answer()

    def launched(self, launched: Launched) -> None:
        """Remember full blocks of prompts, by `settle` or when somebody asks for anything.

        Sequences without a table are ignored.
        """
        self._unsettled.append(launched)

    def release(self, release: Release) -> None:
        """Forget sequences and remember their full blocks, by `settle` or when somebody asks for anything.

        Sequences that were never matched are ignored.
        """
        self._unsettled.append(release)

    @property
    def is_unsettled(self) -> bool:
        """Whether `settle` has something to do."""
        return bool(self._unsettled)

    def settle(self) -> None:
        """Do what launches and releases have left to do."""
        while self._unsettled:
            message = self._unsettled[0]
            if isinstance(message, Launched):
                self._remember(message)
            else:
                self._store.advance(message.now_s)
                for row in message.rows:
                    self._forget(row)
            # Only now: what fails for somebody who asks for figures must fail for the cache's own actor, too.
            self._unsettled.popleft()

    def pin(self, pin: Pin) -> Pinned:
        """Keep the cached full blocks of these tokens; once more for each Pin."""
        self.settle()
        self._store.advance(pin.now_s)
        num_blocks = self._pins.pin(self._chain(pin.namespace, pin.token_ids))
        return Pinned(pin.request_id, num_blocks * self._block_size)

    def unpin(self, unpin: Unpin) -> Pinned:
        """Undo the last Pin of these tokens; 0 tokens when there is none."""
        self.settle()
        self._store.advance(unpin.now_s)
        num_blocks = self._pins.unpin(self._chain(unpin.namespace, unpin.token_ids))
        return Pinned(unpin.request_id, num_blocks * self._block_size)

    def clear(self, clear: Clear) -> Pinned:
        """Forget all evictable blocks."""
        self.settle()
        return Pinned(clear.request_id, self._store.clear() * self._block_size)

    def statistics(self, now_s: float | None = None) -> CacheStatistics:
        """A snapshot; with `now_s`, after what has expired by then is forgotten."""
        self.settle()
        store = self._store
        if now_s is not None:
            store.advance(now_s)
        return CacheStatistics(
            block_size_tokens=self._block_size,
            num_blocks=store.capacity_blocks,
            num_free_blocks=store.num_free_blocks,
            num_evictable_blocks=store.tree.num_idle_blocks,
            num_used_blocks=store.capacity_blocks - store.num_available_blocks,
            num_cached_blocks=store.tree.num_blocks,
            num_pinned_blocks=self._pins.num_blocks(),
            num_sequences=len(self._sequences),
            num_query_tokens=self._num_query_tokens,
            num_hit_tokens=self._num_hit_tokens,
            num_evicted_blocks=store.num_evicted_blocks,
            num_expired_blocks=store.num_expired_blocks,
            num_copied_blocks=self._num_copied_blocks,
            num_preemptions=self._num_preemptions,
        )

    def check_integrity(self) -> None:
        """Raise AssertionError unless references, locks, queues and tables agree. Looks at every block."""
        self.settle()
        tables = Counter(block_id for sequence in self._sequences.values() for block_id in sequence.table)
        self._store.check_integrity(tables, self._pins.counts())
        for sequence_id, sequence in self._sequences.items():
            assert sequence.sequence_id == sequence_id, f"sequence {sequence.sequence_id} is filed as {sequence_id}"
            assert not (sequence.is_held and sequence.is_admitted), f"sequence {sequence_id} is held and admitted"
            assert not sequence.table or sequence.is_held or sequence.is_admitted, f"idle {sequence_id} has a table"
            assert sequence.num_tokens <= len(sequence.table) * self._block_size, f"sequence {sequence_id} overflows"
        held = {sequence_id for sequence_id, sequence in self._sequences.items() if sequence.is_held}
        assert set(self._held) == held, "the held sequences are not those that say so"

    def _remember(self, launched: Launched) -> None:
        for sequence_id, num_tokens in zip(launched.sequence_ids, launched.num_tokens, strict=True):
            sequence = self._sequences.get(sequence_id)
            if sequence is not None and sequence.is_admitted:
                self._recorder.remember(sequence, min(num_tokens, sequence.num_prompt_tokens))

    def _forget(self, row: ReleaseRow) -> None:
        sequence = self._sequences.get(row.sequence_id)
        if sequence is None:
            return
        if row.packed_ids and sequence.is_admitted:
            sequence.chain.extend(row.packed_ids)
            # After a preemption the blocks may hold less than was once computed.
            self._recorder.remember(sequence, min(len(row.packed_ids) // TOKEN_BYTES, sequence.num_tokens))
        self._drop_table(sequence)
        del self._sequences[row.sequence_id]

    def _chain(self, namespace: bytes, token_ids: Sequence[TokenId]) -> TokenChain:
        chain = TokenChain(namespace, self._block_size)
        chain.extend(pack_tokens(token_ids))
        return chain

    def _match_row(self, row: MatchRow) -> int:
        num_tokens = len(row.packed_ids) // TOKEN_BYTES
        if not 0 < row.num_prompt_tokens <= num_tokens:
            raise ValueError(
                f"num_prompt_tokens must be in 1..{num_tokens}, the number of tokens, got {row.num_prompt_tokens}"
            )
        sequence = self._sequences.get(row.sequence_id)
        if sequence is None:
            sequence = CachedSequence(row.sequence_id, TokenChain(row.namespace, self._block_size))
            self._sequences[row.sequence_id] = sequence
        elif sequence.is_admitted:
            raise ValueError(f"sequence_id must be of a sequence without a table, got {row.sequence_id}")
        self._drop_table(sequence)
        sequence.chain.extend(row.packed_ids)
        sequence.num_known_tokens = num_tokens
        sequence.num_prompt_tokens = row.num_prompt_tokens
        parent = self._fork_parent(row, sequence.chain)
        if parent is not None:
            self._hold_fork(sequence, parent)
        elif row.use_cached:
            self._hold_prefix(sequence)
        sequence.is_held = True
        self._held[row.sequence_id] = sequence
        return sequence.num_tokens

    def _fork_parent(self, row: MatchRow, chain: TokenChain) -> CachedSequence | None:
        if row.fork_of is None or not row.use_cached:
            return None
        parent = self._sequences.get(row.fork_of)
        if parent is None or not parent.is_admitted or parent.num_tokens < row.num_prompt_tokens:
            return None
        return parent if chain.agrees(parent.chain, row.num_prompt_tokens) else None

    def _hold_fork(self, sequence: CachedSequence, parent: CachedSequence) -> None:
        # The last known token is always computed, so a fresh fork writes the prompt's last position once more.
        sequence.num_tokens = min(sequence.num_prompt_tokens, sequence.num_known_tokens - 1)
        sequence.table.extend(parent.table[: self._num_blocks(sequence.num_prompt_tokens)])
        for block_id in sequence.table:
            self._store.share(block_id)

    def _hold_prefix(self, sequence: CachedSequence) -> None:
        nodes = self._store.tree.longest(sequence.chain, (sequence.num_known_tokens - 1) // self._block_size)
        if not nodes:
            return
        self._store.share_chain(nodes)
        sequence.table.extend([node.block_id for node in nodes])
        sequence.num_tokens = len(nodes) * self._block_size
        sequence.num_inserted, sequence.tip = len(nodes), nodes[-1]

    def _drop_unnamed_holds(self, rows: Iterable[ReserveRow]) -> None:
        named = {row.sequence_id for row in rows}
        for sequence in [sequence for sequence_id, sequence in self._held.items() if sequence_id not in named]:
            self._drop_table(sequence)

    def _serve(self, sequence: CachedSequence, row: ReserveRow, index: int, step: _Step) -> bool:
        """Grant a row that needs blocks, copies or its first table; False when there is no room."""
        if sequence in step.robbed:
            return False
        if row.num_computed_tokens > sequence.num_tokens:
            raise ValueError(
                f"num_computed_tokens must be <= {sequence.num_tokens}, what sequence {row.sequence_id} has matched or "
                f"reserved, got {row.num_computed_tokens}"
            )
        table, references = sequence.table, self._store.num_references
        first, end = row.num_computed_tokens // self._block_size, self._num_blocks(row.num_tokens)
        shared = [place for place in range(first, min(end, len(table))) if references[table[place]] > 1]
        num_new = max(0, self._num_blocks(row.num_table_tokens) - len(table))
        if not self._make_room(len(shared) + num_new, row, index, step):
            if sequence.is_held:
                self._drop_table(sequence)
            return False
        changed = min([0] if not sequence.is_admitted else [*shared, len(table)])
        for place in shared:
            step.copies.append(self._replace(table, place))
        table.extend([self._store.take() for _ in range(num_new)])
        if changed < len(table):
            step.tables.append(SequenceTable(row.sequence_id, changed, tuple(table[changed:])))
        if not sequence.is_admitted:
            self._admit(sequence)
        sequence.room_tokens = len(table) * self._block_size
        sequence.num_tokens = row.num_tokens
        sequence.granted_in = step.reserve.step_id
        return True

    def _admit(self, sequence: CachedSequence) -> None:
        self._num_query_tokens += sequence.num_known_tokens
        self._num_hit_tokens += sequence.num_tokens
        self._held.pop(sequence.sequence_id, None)
        sequence.is_held, sequence.is_admitted = False, True

    def _replace(self, table: list[BlockId], place: int) -> BlockCopy:
        source, target = table[place], self._store.take()
        table[place] = target
        self._store.drop(source)
        self._num_copied_blocks += 1
        return BlockCopy(source, target)

    def _make_room(self, num_blocks: int, row: ReserveRow, index: int, step: _Step) -> bool:
        missing = num_blocks - self._store.num_available_blocks
        if missing <= 0:
            return True
        losers = self._losers(missing, row, index, step)
        for sequence in losers:
            if sequence.is_admitted:
                step.preempted.append(sequence.sequence_id)
                self._num_preemptions += 1
            step.robbed.add(sequence)
            self._drop_table(sequence)
        return bool(losers)

    def _losers(self, missing: int, row: ReserveRow, index: int, step: _Step) -> list[CachedSequence]:
        """The first candidates whose tables together yield `missing` blocks; none if all of them do not."""
        losers: list[CachedSequence] = []
        forecast = Forecast(self._store)
        for sequence in self._candidates(row, index, step):
            losers.append(sequence)
            missing -= forecast.drop(sequence.table)
            if missing <= 0:
                return losers
        return []

    def _candidates(self, row: ReserveRow, index: int, step: _Step) -> Iterable[CachedSequence]:
        """Who may lose blocks to a row: matches held for later rows, the last first, then the allowed victims."""
        for later in reversed(step.reserve.rows[index + 1 :] if self._held else ()):
            held = self._held.get(later.sequence_id)
            if held is not None and held.table:
                yield held
        for sequence_id in dict.fromkeys(step.reserve.victims[: row.max_victims]):
            victim = self._sequences.get(sequence_id)
            if victim is None or not victim.is_admitted or sequence_id == row.sequence_id:
                continue
            if victim.granted_in != step.reserve.step_id:
                yield victim

    def _drop_table(self, sequence: CachedSequence) -> None:
        """Take everything from a sequence but its hashed tokens."""
        self._store.drop_table(sequence.table)
        sequence.table.clear()
        sequence.is_held = sequence.is_admitted = False
        sequence.room_tokens = sequence.num_tokens = sequence.num_inserted = 0
        sequence.tip = None
        self._held.pop(sequence.sequence_id, None)

    def _num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self._block_size)
