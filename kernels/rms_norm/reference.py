"""RMSNorm (Zhang and Sennrich, arXiv 1910.07467) in plain torch.

T tokens, D features; any leading axes may take the place of T.
"""

import torch


def rms_norm(x_TD: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
    """`weight * x / sqrt(mean(x²) + eps)`; computed in float32, rounded to x's dtype before the weight is applied."""
    x32 = x_TD.to(torch.float32, copy=True)
    inverse_T1 = x32.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
    return x32.mul_(inverse_T1).to(x_TD.dtype).mul_(weight_D)


def add_rms_norm(x_TD: torch.Tensor, residual_TD: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
    """Add `x_TD` to `residual_TD` in place and return the norm of the sum."""
    residual_TD += x_TD
    return rms_norm(residual_TD, weight_D, eps)
