"""Paged attention of whole batches, by the GPU's kernels or in their interpreter."""

import torch

from paged_sequences import PagedSequences
from triode.kernels.gpu_traits import GpuTraits
from triode.kernels.paged_attention.gpu import AttentionWorkspace, paged_attention
from triode.kernels.paged_attention.tiles import AttentionTile


def attended_rows(
    rows: PagedSequences,
    traits: GpuTraits,
    workspace: AttentionWorkspace,
    *,
    window_tokens: int,
    num_splits: int,
    tile: AttentionTile | None,
) -> torch.Tensor:
    """NaN wherever nothing is written; the workspace is left as it must be found."""
    out = torch.full_like(rows.q_TNH, torch.nan)
    paged_attention(
        rows.q_TNH,
        rows.key_PBKH,
        rows.value_PBKH,
        rows.block_table_RC,
        rows.query_start_R1,
        rows.start_R,
        out,
        scale=rows.scale,
        max_query_tokens=rows.max_query_tokens,
        traits=traits,
        window_tokens=window_tokens,
        num_splits=num_splits,
        workspace=workspace,
        tile=tile,
    )
    assert not workspace.arrivals_W.any()
    return out
