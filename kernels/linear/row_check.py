"""How must rows be grouped so that a row of a product is the same whatever the other rows are? Ask the product itself.

The check multiplies a few distinct rows, repeated, in calls of many sizes: every copy of a row must give the same bits,
wherever it stands and however many rows the call has.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

_COUNTS = (4, 8, 12, 16, 20, 32, 36, 64, 256)
# A large matrix is checked with fewer calls, so that the check takes about as long as laying it out.
_LARGE_ELEMENTS = 4_000_000
_LARGE_COUNTS = (4, 8, 16, 32)
_DISTINCT_ROWS = 4


@dataclass(frozen=True, slots=True)
class RowRule:
    """How a call groups its rows."""

    multiple: int = 4
    """The number of rows is padded to a multiple of this."""
    block: int | None = None
    """The product is taken over blocks of exactly this many rows; None takes all rows at once."""

    def __str__(self) -> str:
        if self.block is None:
            return f"rows padded to a multiple of {self.multiple}"
        return f"rows taken in blocks of {self.block}"


_RULES = (RowRule(4), RowRule(8), RowRule(16))
SAFE_RULE = RowRule(16, block=16)
"""Every call has the same shape, so the library has nothing to choose by."""


def find_row_rule(
    product: Callable[[torch.Tensor], torch.Tensor], in_features: int, out_features: int, dtype: torch.dtype
) -> RowRule:
    """The cheapest rule under which the product keeps rows apart."""
    x = torch.randn(_DISTINCT_ROWS, in_features, generator=torch.Generator().manual_seed(0)).to(dtype)
    counts = _COUNTS if in_features * out_features <= _LARGE_ELEMENTS else _LARGE_COUNTS
    for rule in _RULES:
        if _keeps_rows_apart(product, x, [count for count in counts if count % rule.multiple == 0]):
            return rule
    return SAFE_RULE


def _keeps_rows_apart(product: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, counts: list[int]) -> bool:
    expected = None
    for count in counts:
        y = product(x.repeat(count // _DISTINCT_ROWS, 1)).unflatten(0, (-1, _DISTINCT_ROWS))
        expected = y[0].clone() if expected is None else expected
        if not torch.equal(y, expected.expand_as(y)):
            return False
    return True
