"""What the scheduler asks of the cache manager, and what it answers.

A *sequence* is known to the manager from its first Match until its Release. Its *table* lists the blocks that hold the
KV entries of its tokens 0, 1, 2, ... in order. Blocks are shared between tables (a common prefix, the samples of one
request) and written only by their single owner: a shared block that a row would write into is copied first.
"""

import msgspec

from triode.ids import BlockId, RequestId, SequenceId, StepId, TokenId


class BlockCopy(msgspec.Struct, frozen=True, gc=False):
    """Copy-on-write: all layers of block `source` are copied to `target` before the step computes.

    The target of one copy may be the source of an earlier one: read all sources first, or copy in order.
    """

    source: BlockId
    target: BlockId


class MatchRow(msgspec.Struct, frozen=True, gc=False):
    """A sequence about to be admitted."""

    sequence_id: SequenceId
    packed_ids: bytes
    """All known tokens (`triode.ids.pack_tokens`). At least the last one is always left to compute."""
    num_prompt_tokens: int
    """Blocks within these tokens enter the prefix tree when Launched says that they are computed."""
    namespace: bytes
    """Sequences share cached blocks only within a namespace (adapter, cache salt, image content)."""
    use_cached: bool = True
    """False: match nothing (every position must be computed); the blocks are inserted all the same."""
    fork_of: SequenceId | None = None
    """A sample of the same request whose prompt blocks this one shares, the partial last block included.

    It must not be cancelled: what it was granted last may never have been launched.
    """


class Match(msgspec.Struct, frozen=True, tag=True):
    """How long is the cached prefix of each row? Matched blocks are held for the rows until the next Reserve."""

    rows: tuple[MatchRow, ...]
    now_s: float
    """For TTL: what has expired is not found."""


class Matched(msgspec.Struct, frozen=True, tag=True):
    """Parallel to the rows of Match."""

    num_cached_tokens: tuple[int, ...]


class ReserveRow(msgspec.Struct, frozen=True, gc=False):
    """A row that wants to compute."""

    sequence_id: SequenceId
    num_computed_tokens: int
    """Tokens with KV entries before this step: the first position that the step writes."""
    num_tokens: int
    """Tokens with KV entries after this step."""
    num_table_tokens: int
    """The table must have room for this many tokens (>= num_tokens: a new row reserves its whole prompt)."""
    max_victims: int
    """This row may preempt only the first so many entries of `Reserve.victims`."""


class Reserve(msgspec.Struct, frozen=True, tag=True):
    """One step's wants, in priority order. Held matches that no row of this message names are dropped."""

    step_id: StepId
    rows: tuple[ReserveRow, ...]
    victims: tuple[SequenceId, ...]
    """Sequences that may be preempted, the first to go first. A row granted in this step is never a victim."""
    now_s: float
    """For TTL and LRU order."""


class SequenceTable(msgspec.Struct, frozen=True, gc=False):
    """Entries `first_block, ...` of a sequence's table are now `block_ids`."""

    sequence_id: SequenceId
    first_block: int
    block_ids: tuple[BlockId, ...]


class Reserved(msgspec.Struct, frozen=True, tag=True):
    """`granted` is parallel to the rows of Reserve. A preempted sequence has lost its table."""

    step_id: StepId
    granted: tuple[bool, ...]
    preempted: tuple[SequenceId, ...]
    tables: tuple[SequenceTable, ...]
    """Every change of a granted row's table; a newly admitted row's whole table."""
    copies: tuple[BlockCopy, ...]


class Launched(msgspec.Struct, frozen=True, tag=True):
    """A step that computes tokens of prompts is on its way: steps after it find their KV entries. Parallel tuples."""

    sequence_ids: tuple[SequenceId, ...]
    num_tokens: tuple[int, ...]
    """Tokens with KV entries after the step."""


class ReleaseRow(msgspec.Struct, frozen=True, gc=False):
    """A sequence that has ended. Full blocks of its tokens enter the prefix tree; the others become free."""

    sequence_id: SequenceId
    packed_ids: bytes
    """The valid tokens whose KV entries were computed (nothing after a stop); empty to insert nothing new."""


class Release(msgspec.Struct, frozen=True, tag=True):
    """Sequences whose last launched step has retired."""

    rows: tuple[ReleaseRow, ...]
    now_s: float


class Pin(msgspec.Struct, frozen=True, tag=True):
    """Keep the cached full blocks of these tokens until Unpin: they are not evicted and do not expire."""

    request_id: RequestId
    """Names the answer."""
    token_ids: tuple[TokenId, ...]
    namespace: bytes
    now_s: float


class Unpin(msgspec.Struct, frozen=True, tag=True):
    """Undo one Pin of the same tokens."""

    request_id: RequestId
    token_ids: tuple[TokenId, ...]
    namespace: bytes
    now_s: float


class Clear(msgspec.Struct, frozen=True, tag=True):
    """Forget every cached block that is neither pinned nor in a table."""

    request_id: RequestId


class Pinned(msgspec.Struct, frozen=True, tag=True):
    """Answer to Pin, Unpin and Clear: how many tokens were pinned, unpinned or forgotten."""

    request_id: RequestId
    num_tokens: int
