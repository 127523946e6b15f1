"""Scatter new keys and values into the cache, in plain torch.

T tokens, K KV heads, H head dim, P blocks, B block size.
"""

import torch


def store_kv(
    k_TKH: torch.Tensor, v_TKH: torch.Tensor, key_PBKH: torch.Tensor, value_PBKH: torch.Tensor, slot_T: torch.Tensor
) -> None:
    """Write each token's key and value at `slot = block * B + offset`; padding shares slot 0."""
    key_PBKH.flatten(0, 1).index_copy_(0, slot_T, k_TKH)
    value_PBKH.flatten(0, 1).index_copy_(0, slot_T, v_TKH)
