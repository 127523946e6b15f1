"""Programs that share long rows give the bits of those that do not, on a real GPU."""

import pytest
import torch

from paged_sequences import PagedSequences, attention_oracle, paged_sequences, relative_error

pytest.importorskip("triton")

from attended_rows import attended_rows
from triode.kernels.gpu_traits import GpuTraits
from triode.kernels.paged_attention.gpu import AttentionWorkspace
from triode.kernels.paged_attention.tiles import AttentionTile

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore")]

# Of the sixth row's 36 tokens none is left for the third tile that there may be of it.
STARTS = [0, 600, 64, 63, 511, 900, 2500, 3960]
NUM_QUERIES = [333, 1, 0, 130, 2, 36, 150, 40]


def attend(
    rows: PagedSequences, num_splits: int, window_tokens: int = 0, tile: AttentionTile | None = None
) -> torch.Tensor:
    num_kv_heads, head_dim = rows.key_PBKH.shape[2:]
    num_programs = (len(rows.q_TNH) // 16 + len(rows.start_R)) * num_kv_heads
    workspace = AttentionWorkspace.allocate(num_programs, 9, 128, head_dim, rows.q_TNH.device)
    workspace.state_WSM2.fill_(torch.nan)
    workspace.partial_WSMH.fill_(torch.nan)
    traits = GpuTraits.of(rows.q_TNH.device)
    return attended_rows(rows, traits, workspace, window_tokens=window_tokens, num_splits=num_splits, tile=tile)


@pytest.mark.parametrize("window_tokens", [0, 1000])
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim", "block_size", "dtype"),
    [(28, 4, 128, 16, torch.bfloat16), (9, 3, 64, 16, torch.bfloat16), (14, 2, 64, 128, torch.float16)],
)
def test_programs_that_share_long_rows_give_the_bits_of_one_and_of_every_tile(
    num_heads: int, num_kv_heads: int, head_dim: int, block_size: int, dtype: torch.dtype, window_tokens: int
) -> None:
    rows = paged_sequences(
        STARTS,
        NUM_QUERIES,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        block_size=block_size,
        dtype=dtype,
        device="cuda",
    )
    # Wide scores, whose weights do not add up without rounding: then the order of sums shows.
    rows.q_TNH.mul_(8)
    whole = attend(rows, 1, window_tokens)
    assert relative_error(whole, attention_oracle(rows, window_tokens)) < 6e-3
    for num_splits in (2, 3, 8, 9):
        assert torch.equal(attend(rows, num_splits, window_tokens), whole)
    for num_splits in (1, 3):
        assert torch.equal(attend(rows, num_splits, window_tokens, AttentionTile(128, 8, 2)), whole)
