"""SwiGLU (Shazeer, arXiv 2002.05202) in plain torch.

T tokens, F intermediate features.
"""

import torch


def swiglu(gate_up_TF2: torch.Tensor) -> torch.Tensor:
    """`silu(gate) * up`; the first F columns are the gate, the last F are up. Computed in float32.

    silu is spelt out by `exp`: torch's own silu and sigmoid round differently at the ends of a thread's share, so that
    a value would depend on where in the batch it stands.
    """
    gate_TF, up_TF = gate_up_TF2.chunk(2, dim=-1)
    gate32 = gate_TF.float()
    denominator = torch.neg(gate32).exp_().add_(1)
    return torch.div(gate32, denominator, out=denominator).mul_(up_TF).to(gate_up_TF2.dtype)
