"""Rotary position embedding (Su et al., arXiv 2104.09864) in plain torch, for the pairing (i, i + H/2).

T tokens, J heads, H head dim, U = H / 2 pairs.
"""

import torch


def rotary(x_TJH: torch.Tensor, cos_TU: torch.Tensor, sin_TU: torch.Tensor) -> None:
    """Rotate every head of every token in place, in float32.

    Args:
        x_TJH: the heads to rotate, queries and keys alike.
        cos_TU: float32, the cosines of each token's angles.
        sin_TU: float32, the sines.
    """
    first_TJU, second_TJU = x_TJH.unflatten(-1, (2, -1)).unbind(-2)
    first32_TJU, second32_TJU = first_TJU.float(), second_TJU.float()
    cos_T1U, sin_T1U = cos_TU[:, None], sin_TU[:, None]
    turned_first_TJU = (first32_TJU * cos_T1U).sub_(second32_TJU * sin_T1U)
    turned_second_TJU = (second32_TJU * cos_T1U).add_(first32_TJU * sin_T1U)
    first_TJU.copy_(turned_first_TJU)
    second_TJU.copy_(turned_second_TJU)
