"""What the manager knows about one sequence."""

from dataclasses import dataclass, field

from triode.cache.chain import TokenChain
from triode.cache.prefix import Node
from triode.ids import BlockId, SequenceId, StepId


# Compared by identity: two sequences are never the same.
@dataclass(eq=False, slots=True)
class CachedSequence:
    """A sequence from its first Match to its Release.

    It is *held* after a Match, *admitted* once a Reserve has granted it a row, and *idle*, without a table, when it has
    lost the one or the other; the next Match holds it again.
    """

    sequence_id: SequenceId
    chain: TokenChain
    """Outlives the table, so that matching again hashes nothing again."""
    num_known_tokens: int = 0
    num_prompt_tokens: int = 0
    is_held: bool = False
    is_admitted: bool = False
    table: list[BlockId] = field(default_factory=list)
    room_tokens: int = 0
    """What an admitted sequence's table has room for; 0 for others, which keeps them off the fast path."""
    num_tokens: int = 0
    """Tokens with KV entries: matched, or granted by the Reserves since."""
    granted_in: StepId | None = None
    """The last step that granted a row."""
    num_inserted: int = 0
    """Blocks from the first on that the prefix tree has, these or equal ones."""
    tip: Node | None = None
    """The node of the last of them; it may have been forgotten since if it is not our own block."""
