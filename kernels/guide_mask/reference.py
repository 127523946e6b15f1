"""Leaving the tokens that a guide allows: the reference.

A mask has one bit a token, token i at bit i mod 32 of word i div 32.

    R rows        G rows with a mask        V vocabulary        W 32-bit words of a mask, at least V bits
"""

import numpy as np
import numpy.typing as npt
import torch


def forbid(logits_RV: torch.Tensor, mask_GW: npt.NDArray[np.int32], row_G: npt.NDArray[np.int32]) -> None:
    """Set the logits of tokens that are not in their row's mask to -inf. They are in host memory."""
    bits_GV = np.unpackbits(mask_GW.view(np.uint8), axis=-1, count=logits_RV.shape[-1], bitorder="little")
    forbidden_GV = torch.from_numpy(bits_GV) == 0
    for forbidden_V, row in zip(forbidden_GV, row_G.tolist(), strict=True):
        logits_RV[row].masked_fill_(forbidden_V, -torch.inf)
