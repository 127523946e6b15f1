"""SwiGLU (Shazeer, arXiv 2002.05202) in plain torch.

T tokens, F intermediate features.
"""

import torch

# Intermediate float32 results of one block stay in a core's cache.
_BLOCK_ELEMENTS = 1 << 17


def swiglu(gate_up_TF2: torch.Tensor) -> torch.Tensor:
    """`silu(gate) * up`; the first F columns are the gate, the last F are up. Computed in float32.

    silu is spelt out by `exp`: torch's own silu and sigmoid round differently at the ends of a thread's share, so that
    a value would depend on where in the batch it stands.
    """
    num_tokens, columns = gate_up_TF2.shape
    out_TF = gate_up_TF2.new_empty(num_tokens, columns // 2)
    block = max(1, _BLOCK_ELEMENTS // columns)
    for gate_up, out in zip(gate_up_TF2.split(block), out_TF.split(block), strict=True):
        gate, up = gate_up.float().chunk(2, dim=-1)
        denominator = torch.neg(gate).exp_().add_(1)
        out.copy_(torch.div(gate, denominator, out=denominator).mul_(up))
    return out_TF
