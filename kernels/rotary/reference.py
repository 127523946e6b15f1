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
    x_TJ2U = x_TJH.unflatten(-1, (2, -1))
    first, second = x_TJ2U.unbind(-2)
    turned = torch.stack((-second, first), dim=-2) * sin_TU[:, None, None]
    x_TJ2U.copy_(turned.add_(x_TJ2U * cos_TU[:, None, None]))
