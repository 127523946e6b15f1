import math

import pytest
import torch

from attended_rows import attended_rows
from paged_sequences import PagedSequences, attention_oracle, paged_sequences, relative_error
from triode.kernels.gpu_traits import INTERPRETER
from triode.kernels.paged_attention.gpu import AttentionWorkspace, paged_attention
from triode.kernels.paged_attention.states import merge_long_rows
from triode.kernels.paged_attention.tiles import SEGMENT_TOKENS, TILE_TOKENS, AttentionTile

PREFILL = AttentionTile(pairs=32, num_warps=4, num_stages=2)


def workspace_of(rows: PagedSequences) -> AttentionWorkspace:
    num_tokens, _, head_dim = rows.q_TNH.shape
    num_programs = (num_tokens + len(rows.start_R)) * rows.key_PBKH.shape[2]
    return AttentionWorkspace.allocate(num_programs, 4, 32, head_dim, torch.device("cpu"))


def attend(
    rows: PagedSequences,
    *,
    window_tokens: int = 0,
    num_splits: int = 1,
    tile: AttentionTile | None = None,
    workspace: AttentionWorkspace | None = None,
) -> torch.Tensor:
    return attended_rows(
        rows,
        INTERPRETER,
        workspace or workspace_of(rows),
        window_tokens=window_tokens,
        num_splits=num_splits,
        tile=tile,
    )


@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim"),
    [(4, 4, 64), (7, 1, 128), (3, 1, 80), (2, 1, 96), (2, 1, 256), (20, 1, 64)],
)
def test_every_head_size_and_group_size_is_computed(num_heads: int, num_kv_heads: int, head_dim: int) -> None:
    rows = paged_sequences(
        [70, 0], [1, 1], num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, dtype=torch.float16
    )
    assert relative_error(attend(rows), attention_oracle(rows)) < 2e-3


@pytest.mark.parametrize("block_size", [16, 32, 64, 128])
def test_a_tile_may_span_blocks_of_any_size(block_size: int) -> None:
    rows = paged_sequences([0, 130, 5], [70, 1, 9], block_size=block_size)
    assert relative_error(attend(rows, tile=PREFILL), attention_oracle(rows)) < 1e-5


@pytest.mark.parametrize("num_splits", [2, 3, 8])
def test_programs_that_share_a_row_give_what_one_program_gives(num_splits: int) -> None:
    rows = paged_sequences([1100, 70, 511, 512], [1, 1, 1, 1])
    assert torch.equal(attend(rows, num_splits=num_splits), attend(rows))
    assert relative_error(attend(rows, num_splits=num_splits), attention_oracle(rows)) < 1e-5


@pytest.mark.parametrize("ahead", [1, 3, 8])
@pytest.mark.parametrize("window_tokens", [0, 600])
def test_states_in_memory_merge_to_what_one_program_gives(window_tokens: int, ahead: int) -> None:
    rows = paged_sequences([1100, 70, 500], [19, 40, 20], head_dim=64)
    (num_tokens, num_heads, head_dim), num_kv_heads = rows.q_TNH.shape, rows.key_PBKH.shape[2]
    group = num_heads // num_kv_heads
    query_tokens, pairs, workspace = PREFILL.pairs // group, 8, workspace_of(rows)
    out = attend(rows, window_tokens=window_tokens, num_splits=3, tile=PREFILL, workspace=workspace)
    merged = torch.full_like(out, torch.nan)
    merge_long_rows[(num_tokens // query_tokens + len(rows.start_R), num_kv_heads, PREFILL.pairs // pairs)](
        rows.query_start_R1,
        rows.start_R,
        merged,
        workspace.state_WSM2,
        workspace.partial_WSMH,
        *workspace.state_WSM2.shape[1:3],
        len(rows.start_R),
        rows.scale * math.log2(math.e),
        merged.stride(0),
        GROUP=group,
        HEAD=head_dim,
        NUM_KV_HEADS=num_kv_heads,
        QUERY_TOKENS=query_tokens,
        TILE=TILE_TOKENS,
        SEGMENT=SEGMENT_TOKENS,
        WINDOW=window_tokens,
        PAIRS=pairs,
        AHEAD=ahead,
        PDL=False,
    )
    assert torch.equal(merged, out)
    assert torch.equal(out, attend(rows, window_tokens=window_tokens, tile=PREFILL))


@pytest.mark.parametrize("window_tokens", [1, 40, 600])
def test_a_window_hides_what_lies_before_it(window_tokens: int) -> None:
    rows = paged_sequences([700, 0, 20], [3, 66, 1])
    for num_splits in (1, 2):
        out = attend(rows, window_tokens=window_tokens, num_splits=num_splits, tile=PREFILL)
        assert relative_error(out, attention_oracle(rows, window_tokens)) < 1e-5


def test_prefill_and_decode_rows_share_a_launch() -> None:
    rows = paged_sequences([0, 600, 64, 63], [33, 1, 17, 2])
    assert relative_error(attend(rows, tile=PREFILL), attention_oracle(rows)) < 1e-5


@pytest.mark.parametrize("kv_dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_the_cache_may_hold_other_types_than_the_queries(kv_dtype: torch.dtype) -> None:
    rows = paged_sequences([70, 10], [1, 4], kv_dtype=kv_dtype)
    assert relative_error(attend(rows), attention_oracle(rows)) < 1e-5


def test_a_split_without_room_for_its_states_is_refused() -> None:
    rows = paged_sequences([700], [1])
    with pytest.raises(ValueError, match="workspace must hold"):
        paged_attention(
            rows.q_TNH,
            rows.key_PBKH,
            rows.value_PBKH,
            rows.block_table_RC,
            rows.query_start_R1,
            rows.start_R,
            torch.empty_like(rows.q_TNH),
            scale=rows.scale,
            max_query_tokens=1,
            traits=INTERPRETER,
            num_splits=2,
        )
