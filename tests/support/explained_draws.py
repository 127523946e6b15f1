"""Whether a drawn token is one that float64 arithmetic could have drawn, up to the last bits of float32.

Two implementations may round a probability differently. That can move the end of a nucleus by one token and the running
sum by a few units of 2**-24, so a draw next to a boundary may fall on its other side: no more than that.
"""

import torch

_ROUNDING = 1e-6


def is_explained(
    logits_V: torch.Tensor, token: int, uniform: float, temperature: float, top_k: int, top_p: float, min_p: float
) -> bool:
    """Whether `uniform` lies in the token's part of the kept distribution, give or take one token and the rounding."""
    probs_V = (logits_V.double() / temperature).softmax(-1)
    order_V = torch.sort(probs_V, descending=True, stable=True).indices
    sorted_V = probs_V[order_V]
    limit = top_k if 0 < top_k < len(probs_V) else len(probs_V)
    mass = sorted_V[:limit].sum()
    num_kept = min(limit, int((sorted_V.cumsum(-1) < top_p * mass).sum()) + 1) if top_p < 1 else limit
    num_kept = min(num_kept, int((sorted_V >= min_p * sorted_V[0]).sum()))
    kept_V = torch.zeros_like(probs_V)
    kept_V[order_V[:num_kept]] = sorted_V[:num_kept]
    least = float(sorted_V[num_kept - 1])
    if kept_V[token] == 0 and float(probs_V[token]) < least * (1 - _ROUNDING):
        return False
    after_V = kept_V.cumsum(-1) / kept_V.sum()
    slack = 2 * least / float(kept_V.sum()) + _ROUNDING
    before = float(after_V[token - 1]) if token else 0.0
    return before - slack <= uniform <= float(after_V[token]) + slack
