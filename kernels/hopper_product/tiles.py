"""How programs share a product: what `product.cu` is compiled with. Every tile gives the same bits."""

import dataclasses
import enum

STEP_FEATURES = 64
"""In features of a stage: rows of 128 bytes."""
GROUP = 8
"""Features side by side that are fetched together; of gates, their ups come next."""
_WARP_GROUP_THREADS = 128
_INSTRUCTION_TOKENS = 64
_MOST_COLUMNS = 256
_MOST_CLUSTER = 4
_ATOM_BYTES = 1024
MOST_SHARED_BYTES = 227 * 1024
_BARRIER_BYTES = 16


class Ending(enum.Enum):
    """What becomes of a token's sums, each of which is rounded first."""

    STORE = "product"
    SWIGLU = "swiglu"
    """Sums of gates and ups."""
    ADD = "add"
    """To a residual stream."""

    @property
    def rows_of_feature(self) -> int:
        """Weight rows of an out feature."""
        return 2 if self is Ending.SWIGLU else 1


@dataclasses.dataclass(frozen=True)
class ProductTile:
    """The share of one program, and who does what in it."""

    consumers: int
    """Warp groups that multiply; one more has the copy engine fetch."""
    subtiles: int
    """Times 64 tokens, that each of them takes."""
    columns: int
    """Weight rows of an instruction."""
    num_stages: int
    """Of shared memory, each 64 in features long."""
    parts: int = 1
    """Instructions side by side."""
    shares_weight: bool = False
    """Whether the programs of a cluster have the same weight rows, or the same tokens."""
    cluster: int = 2
    """Programs that share what all of them read."""

    def __post_init__(self) -> None:
        if self.columns % GROUP or self.columns > _MOST_COLUMNS:
            raise ValueError(f"columns must be a multiple of {GROUP} up to {_MOST_COLUMNS}, got {self.columns}")
        if not 1 <= self.cluster <= _MOST_CLUSTER:
            raise ValueError(f"cluster must be 1 to {_MOST_CLUSTER}, got {self.cluster}")
        if self.shared_bytes + self.num_stages * _BARRIER_BYTES > MOST_SHARED_BYTES:
            raise ValueError(f"shared memory must be at most {MOST_SHARED_BYTES} bytes, got {self.shared_bytes}")

    @property
    def tokens(self) -> int:
        """Of a program."""
        return _INSTRUCTION_TOKENS * self.subtiles * self.consumers

    @property
    def rows(self) -> int:
        """Weight rows of a program."""
        return self.parts * self.columns

    @property
    def fetched_tokens(self) -> int:
        """Of a stage, by one program."""
        return self.tokens // (1 if self.shares_weight else self.cluster)

    @property
    def cluster_tokens(self) -> int:
        """Of all programs of a cluster."""
        return self.tokens * (self.cluster if self.shares_weight else 1)

    @property
    def cluster_rows(self) -> int:
        """The same in weight rows."""
        return self.rows * (1 if self.shares_weight else self.cluster)

    @property
    def num_threads(self) -> int:
        """Of a program."""
        return _WARP_GROUP_THREADS * (1 + self.consumers)

    @property
    def shared_bytes(self) -> int:
        """What stages take, and their alignment."""
        return (self.tokens + self.rows) * STEP_FEATURES * 2 * self.num_stages + _ATOM_BYTES

    def num_clusters(self, num_tokens: int, num_rows: int) -> int:
        """Tiles of a cluster that a product with so many weight rows has."""
        return -(-num_tokens // self.cluster_tokens) * -(-num_rows // self.cluster_rows)

    def box_groups(self, ending: Ending) -> int:
        """Groups of features that are fetched at once: all of a stage, or whole fractions that programs take by turns.

        Raises:
            ValueError: gates and ups do not fill whole groups.
        """
        group_rows = GROUP * ending.rows_of_feature
        if self.columns % group_rows:
            raise ValueError(f"columns must be a multiple of {group_rows} for {ending.value}, got {self.columns}")
        num_groups = self.rows // group_rows
        most = max(1, num_groups // (self.cluster if self.shares_weight else 1))
        return max(number for number in range(1, most + 1) if num_groups % number == 0)
