"""In tiles of which lengths does torch's fused attention for the CPU add a query's keys in one order? Ask it.

The kernel walks keys in tiles of 512 positions and multiplies probabilities by values one tile at a time. How a product
is blocked follows from the length of its tile, and only the last tile may be shorter: rows are padded to such lengths
only as give the very bits of a whole tile. Which ones do is a property of the library and the processor (with MKL on
AVX512: up to 192 and from 384).

    M rows     L positions     H head dim
"""

from collections.abc import Callable

import torch

from triode.kernels.threads import cpu_threads

TILE_TOKENS = 512
STEP_TOKENS = 64
MAX_ROWS = 512
"""The check covers calls of up to so many rows a head."""
# Positions that are seen of the first tile, and of the second one.
_VISIBLE_TOKENS = {0: (36, 190, 250, 383, 510), TILE_TOKENS: (190, 383)}

FusedAttention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, float], torch.Tensor]
"""Queries, keys, values, mask and scale to outputs."""


def find_tile_lengths(attend: FusedAttention, head_dim: int) -> tuple[int, ...]:
    """The lengths, multiples of 64 in ascending order, that a last tile may have. Empty if 512 is not among them."""
    lengths = set(range(STEP_TOKENS, TILE_TOKENS + 1, STEP_TOKENS))
    generator = torch.Generator().manual_seed(0)
    for first, numbers in _VISIBLE_TOKENS.items():
        for visible in numbers:
            lengths = _agreeing(attend, _Probe(head_dim, first, visible, generator), lengths)
    return tuple(sorted(lengths)) if TILE_TOKENS in lengths else ()


class _Probe:
    """Four queries that see `visible` positions of the tile that begins at `first`, and all before it."""

    def __init__(self, head_dim: int, first: int, visible: int, generator: torch.Generator) -> None:
        self.first, self.visible = first, visible
        self.q_MH = torch.randn(4, head_dim, generator=generator)
        self.key_LH, self.value_LH = torch.randn(2, first + TILE_TOKENS, head_dim, generator=generator)

    def attend(self, attend: FusedAttention, length: int, num_rows: int) -> torch.Tensor:
        """The outputs of the queries, each repeated: [num_rows / 4, 4, H]."""
        end = self.first + length
        mask_ML = self.q_MH.new_zeros(1, end)
        mask_ML[:, self.first + self.visible :] = -torch.inf
        out = attend(
            self.q_MH.repeat(num_rows // 4, 1)[None, None],
            self.key_LH[None, None, :end],
            self.value_LH[None, None, :end],
            mask_ML.expand(1, 1, num_rows, end),
            self.q_MH.shape[1] ** -0.5,
        )
        return out[0, 0].view(-1, *self.q_MH.shape)


def _agreeing(attend: FusedAttention, probe: _Probe, lengths: set[int]) -> set[int]:
    """Those lengths that agree with a whole tile, or are too short for what the probe sees."""
    expected = probe.attend(attend, TILE_TOKENS, 4)[:1]

    def agrees(length: int) -> bool:
        if length < probe.visible:
            return True
        outputs = (
            probe.attend(attend, length, num_rows) for num_rows in (4, 192 if length < TILE_TOKENS else MAX_ROWS)
        )
        return all(torch.equal(out, expected.expand_as(out)) for out in outputs)

    # Steps of few tokens run on one thread.
    for num_threads in {1, torch.get_num_threads()}:
        with cpu_threads(num_threads):
            lengths = {length for length in lengths if agrees(length)}
    return lengths
