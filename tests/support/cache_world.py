"""A scheduler and a runner in miniature, which judge a CacheManager by what is in the blocks.

What the runner writes at a position is a fingerprint of the namespace and of all tokens up to it, as a KV entry depends
on them all. After each step every table must read back its own sequence, so that whatever error there may be in
sharing, copying or evicting ends as a wrong fingerprint.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random

from triode.cache.config import CacheConfig
from triode.cache.manager import CacheManager
from triode.cache.messages import (
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
from triode.ids import BlockId, RequestId, SequenceId, StepId, TokenId, pack_tokens

BLOCK = 16
MAX_SAMPLES = 9
NOBODY = RequestId("nobody")


@dataclass(eq=False)
class Sample:
    """A sequence as its scheduler sees it."""

    sequence_id: SequenceId
    namespace: bytes
    tokens: list[TokenId]
    num_prompt_tokens: int
    use_cached: bool
    fork_of: SequenceId | None
    num_computed: int = 0
    is_admitted: bool = False
    table: list[BlockId] = field(default_factory=list)

    def fingerprint(self, position: int) -> int:
        """What the KV entry at a position stands for."""
        return hash((self.namespace, tuple(self.tokens[: position + 1])))


class World:
    """Random decisions come from `rng`, so that a storm can be told again."""

    def __init__(self, capacity_blocks: int, config: CacheConfig, rng: Random) -> None:
        self.capacity_blocks = capacity_blocks
        self.manager = CacheManager(capacity_blocks + 1, config)
        self.rng = rng
        self.content: dict[tuple[BlockId, int], int] = {}
        self.samples: list[Sample] = []
        self.cancelled: list[Sample] = []
        """Not in new steps; not yet released, as the last step launched with them still runs."""
        self.pinned: list[tuple[bytes, tuple[TokenId, ...]]] = []
        self.next_id = 0
        self.step_id = 0
        self.now_s = 0.0

    def submit(self) -> None:
        """A request of 1 to 3 samples, likely to share its first blocks with others."""
        prompt = [TokenId(self.rng.randint(0, 1)) for _ in range(self.rng.randint(0, 3)) for _ in range(BLOCK)]
        prompt = [prompt[index - index % BLOCK] for index in range(len(prompt))]
        prompt += [TokenId(2)] * self.rng.randint(0 if prompt else 1, 12)
        namespace = self.rng.choice([b"", b"", b"tenant"])
        use_cached = self.rng.random() < 0.9
        first = SequenceId(self.next_id)
        for _ in range(min(self.rng.choice([1, 1, 2, 3]), MAX_SAMPLES - len(self.samples))):
            sequence_id = SequenceId(self.next_id)
            fork_of = None if sequence_id == first else first
            self.next_id += 1
            self.samples.append(Sample(sequence_id, namespace, list(prompt), len(prompt), use_cached, fork_of))

    def match(self, waiting: Sequence[Sample]) -> tuple[int, ...]:
        """Ask for the cached prefixes of sequences without a table."""
        rows = tuple(
            MatchRow(
                sample.sequence_id,
                pack_tokens(sample.tokens),
                sample.num_prompt_tokens,
                sample.namespace,
                sample.use_cached,
                sample.fork_of,
            )
            for sample in waiting
        )
        cached = self.manager.match(Match(rows, self.now_s)).num_cached_tokens
        for sample, num_cached in zip(waiting, cached, strict=True):
            assert 0 <= num_cached < len(sample.tokens)
            assert sample.use_cached or not num_cached
        return cached

    def match_in_vain(self) -> None:
        """A match whose rows never come to a Reserve."""
        self.match([sample for sample in self.samples if not sample.is_admitted and self.rng.random() < 0.5])

    def step(self) -> None:
        """Match, reserve, launch. Now and then a row is granted and not launched: its sequence was cancelled."""
        samples = self.rng.sample(self.samples, self.rng.randint(0, len(self.samples)))
        waiting = [sample for sample in samples if not sample.is_admitted]
        cached = dict(zip(waiting, self.match(waiting), strict=True))
        reserve = self.wants(samples, cached)
        reserved = self.manager.reserve(reserve)
        self.step_id += 1
        self.check_answer(reserve, reserved)
        cancelled = self.rng.choice(samples) if samples and self.rng.random() < 0.15 else None
        self.launch(reserve, reserved, samples, cancelled)
        if cancelled is not None:
            self.samples.remove(cancelled)
            self.cancelled.append(cancelled)
            # What was granted last is not computed: nobody may fork it any more.
            for sample in self.samples:
                if sample.fork_of == cancelled.sequence_id:
                    sample.fork_of = None

    def wants(self, samples: list[Sample], cached: dict[Sample, int]) -> Reserve:
        """A Reserve in which each row may take from none, some or all of the victims."""
        is_generous = self.rng.random() < 0.5
        rows = []
        for sample in samples:
            computed = cached.get(sample, sample.num_computed)
            end = min(computed + self.rng.choice([1, 5, 16, 40, 90]), len(sample.tokens))
            max_victims = MAX_SAMPLES * 2 if is_generous else self.rng.randint(0, 3)
            table_tokens = max(end, sample.num_prompt_tokens)
            rows.append(ReserveRow(sample.sequence_id, computed, end, table_tokens, max_victims))
        admitted = [sample.sequence_id for sample in self.samples + self.cancelled if sample.is_admitted]
        victims = tuple(self.rng.sample(admitted, len(admitted)))
        return Reserve(StepId(self.step_id), tuple(rows), victims, self.now_s)

    def check_answer(self, reserve: Reserve, reserved: Reserved) -> None:
        """What every answer owes, whatever the state."""
        rows = [row for row, is_granted in zip(reserve.rows, reserved.granted, strict=True) if is_granted]
        granted = {row.sequence_id for row in rows}
        assert not granted & set(reserved.preempted), "a row lost its table after it was granted"
        assert not reserved.preempted or granted, "a preemption helped nobody"
        for sequence_id in reserved.preempted:
            place = reserve.victims.index(sequence_id)
            assert any(place < row.max_victims for row in rows), "a victim that no row was allowed"
        if reserve.rows and reserve.rows[0].max_victims >= len(reserve.victims) and not self.pinned:
            assert reserved.granted[0], "the first row was refused although it might take everything"

    def launch(self, reserve: Reserve, reserved: Reserved, samples: list[Sample], cancelled: Sample | None) -> None:
        """Apply the answer as a runner does: tables, then copies, then writes; then read everything back."""
        by_id = {sample.sequence_id: sample for sample in self.samples + self.cancelled}
        for sequence_id in reserved.preempted:
            self.lose_table(by_id[sequence_id])
        for change in reserved.tables:
            table = by_id[change.sequence_id].table
            assert change.first_block <= len(table), "a table has a hole"
            table[change.first_block :] = change.block_ids
            assert 0 not in table
        for copy in reserved.copies:
            for offset in range(BLOCK):
                self.content[copy.target, offset] = self.content.get((copy.source, offset), 0)
        launched = []
        for sample, row, is_granted in zip(samples, reserve.rows, reserved.granted, strict=True):
            if is_granted:
                sample.is_admitted = True
                # What the match has found.
                sample.num_computed = row.num_computed_tokens
                if sample is not cancelled:
                    self.compute(sample, row)
                    launched.append(row)
        ids, ends = tuple(row.sequence_id for row in launched), tuple(row.num_tokens for row in launched)
        self.manager.launched(Launched(ids, ends))
        for sample in self.samples:
            self.read_back(sample)

    def compute(self, sample: Sample, row: ReserveRow) -> None:
        """Write the row's entries; after the last known token one more is generated."""
        sample.num_computed = row.num_tokens
        for position in range(row.num_computed_tokens, row.num_tokens):
            slot = sample.table[position // BLOCK], position % BLOCK
            self.content[slot] = sample.fingerprint(position)
        if row.num_tokens == len(sample.tokens) < (self.capacity_blocks - 1) * BLOCK:
            # Samples of one request agree for a while, then differ.
            differs = len(sample.tokens) > sample.num_prompt_tokens + 4
            sample.tokens.append(TokenId(sample.sequence_id % 3 if differs else 1))

    def read_back(self, sample: Sample) -> None:
        """A sequence finds its own entries at every position computed so far."""
        for position in range(sample.num_computed):
            found = self.content.get((sample.table[position // BLOCK], position % BLOCK))
            assert found == sample.fingerprint(position), f"sequence {sample.sequence_id} is wrong at {position}"

    def lose_table(self, sample: Sample) -> None:
        """The sequence was preempted."""
        sample.is_admitted = False
        sample.num_computed = 0
        sample.table = []

    def finish(self) -> None:
        """A sequence ends; a stop string may lie before the last token computed."""
        if self.samples:
            sample = self.samples.pop(self.rng.randrange(len(self.samples)))
            self.release(sample, max(0, sample.num_computed - self.rng.choice([0, 0, 1, 20])))

    def retire(self) -> None:
        """The last step launched with a cancelled sequence has ended."""
        if self.cancelled:
            sample = self.cancelled.pop(0)
            self.release(sample, sample.num_computed)

    def release(self, sample: Sample, num_valid: int) -> None:
        """Give a sequence's blocks back."""
        row = ReleaseRow(sample.sequence_id, pack_tokens(sample.tokens[:num_valid]))
        self.manager.release(Release((row,), self.now_s))

    def pin(self) -> None:
        """Pin what is cached of some prefix; at most two pins at a time."""
        tokens = tuple(TokenId(letter) for letter in self.rng.choices([0, 1], k=2) for _ in range(BLOCK))
        namespace = self.rng.choice([b"", b"tenant"])
        if len(self.pinned) < 2 and self.manager.pin(Pin(NOBODY, tokens, namespace, self.now_s)).num_tokens:
            self.pinned.append((namespace, tokens))

    def unpin(self) -> None:
        """Undo the latest pin."""
        if self.pinned:
            namespace, tokens = self.pinned.pop()
            assert self.manager.unpin(Unpin(NOBODY, tokens, namespace, self.now_s)).num_tokens

    def clear(self) -> None:
        """Forget everything that may be forgotten."""
        num_evictable = self.manager.statistics().num_evictable_blocks
        assert self.manager.clear(Clear(NOBODY)).num_tokens == num_evictable * BLOCK
        assert self.manager.statistics().num_evictable_blocks == 0

    def wait(self) -> None:
        """Time passes."""
        self.now_s += self.rng.choice([0.1, 1.0, 6.0])

    def end(self) -> None:
        """Everybody leaves: all blocks have returned."""
        for sample in self.samples + self.cancelled:
            self.release(sample, sample.num_computed)
        while self.pinned:
            self.unpin()
        self.manager.check_integrity()
        statistics = self.manager.statistics()
        assert statistics.num_free_blocks + statistics.num_evictable_blocks == self.capacity_blocks
        self.clear()
        assert self.manager.statistics().num_free_blocks == self.capacity_blocks
