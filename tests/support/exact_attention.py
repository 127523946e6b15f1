"""Attention as it is defined, in float64, over keys and values that lie in one piece."""

from collections.abc import Sequence

import torch

from triode.kernels.paged_attention.rows import AttentionRows


def attention_float64(
    q_TNH: torch.Tensor,
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    rows: AttentionRows,
    scale: float,
    window: int | None = None,
) -> torch.Tensor:
    """Each query over the keys and values [length, K, H] of its row that it sees."""
    out_TNH = torch.empty(q_TNH.shape, dtype=torch.float64)
    group = q_TNH.shape[1] // keys[0].shape[1]
    for row, (key, value) in enumerate(zip(keys, values, strict=True)):
        first, last = rows.query_start_R1[row : row + 2].tolist()
        for token in range(first, last):
            position = int(rows.start_R[row]) + token - first
            seen = slice(max(0, position - window + 1) if window else 0, position + 1)
            key_NLH = key[seen].double().repeat_interleave(group, 1).transpose(0, 1)
            value_NLH = value[seen].double().repeat_interleave(group, 1).transpose(0, 1)
            probs_NL = (key_NLH @ q_TNH[token].double()[:, :, None])[..., 0].mul(scale).softmax(-1)
            out_TNH[token] = (probs_NL[:, None] @ value_NLH)[:, 0]
    return out_TNH
