"""Which query tokens of a step attend to which blocks of the cache.

R rows     C blocks in the longest table     B block size
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class AttentionRows:
    """Rows in plan order, in host memory: what the attention plans of the kernels are made from.

    Row r's query tokens are packed at `query_start_R1[r] : query_start_R1[r + 1]`; their positions start at
    `start_R[r]`. The query at position p sees the keys at positions 0 to p of its own row.
    """

    query_start_R1: npt.NDArray[np.int64]
    start_R: npt.NDArray[np.int64]
    block_table_RC: npt.NDArray[np.int64]
    block_size_tokens: int

    @property
    def num_tokens(self) -> int:
        """Query tokens of all rows."""
        return int(self.query_start_R1[-1])
