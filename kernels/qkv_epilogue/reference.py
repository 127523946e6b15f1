"""What lies between the QKV product and attention, in plain torch: bias, norm, rotation and the write to the cache.

T packed query tokens    N query heads    K KV heads    H head dim    E (N + 2K) H    P blocks    B block size
X positions    r rotated dims of a head
"""

import torch

from triode.kernels.rms_norm.reference import rms_norm
from triode.kernels.rotary.reference import rotary
from triode.kernels.store_kv.reference import store_kv


def qkv_epilogue(
    qkv_TE: torch.Tensor,
    cos_Xr: torch.Tensor,
    sin_Xr: torch.Tensor,
    position_T: torch.Tensor,
    slot_T: torch.Tensor,
    key_PBKH: torch.Tensor,
    value_PBKH: torch.Tensor,
    num_heads: int,
    *,
    bias_E: torch.Tensor | None = None,
    q_norm_H: torch.Tensor | None = None,
    k_norm_H: torch.Tensor | None = None,
    eps: float = 0.0,
) -> torch.Tensor:
    """Write keys and values into the pool and return the finished queries. The tables hold r / 2 columns."""
    num_kv_heads, head_dim = key_PBKH.shape[2:]
    qkv_TE = qkv_TE if bias_E is None else qkv_TE + bias_E
    heads = qkv_TE.unflatten(1, (-1, head_dim))
    parts: list[torch.Tensor] = list(heads.split([num_heads, num_kv_heads, num_kv_heads], 1))
    q_TNH, k_TKH, v_TKH = (part.clone() for part in parts)
    if q_norm_H is not None and k_norm_H is not None:
        q_TNH, k_TKH = rms_norm(q_TNH, q_norm_H, eps), rms_norm(k_TKH, k_norm_H, eps)
    for heads_TJH in (q_TNH, k_TKH):
        rotary(heads_TJH[..., : 2 * cos_Xr.shape[1]], cos_Xr[position_T], sin_Xr[position_T])
    store_kv(k_TKH.to(key_PBKH.dtype), v_TKH.to(value_PBKH.dtype), key_PBKH, value_PBKH, slot_T)
    return q_TNH
