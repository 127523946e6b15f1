"""Leaving the tokens that a guide allows, on an NVIDIA GPU. What it computes, `reference.py` says.

It runs between the two graphs of a step, and for its rows alone: a batch without guides replays both back to back.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import torch
import triton
import triton.language as tl

from triode.kernels.device_code import wait_for_inputs
from triode.kernels.gpu_traits import GpuTraits

_BLOCK_TOKENS = 4096


# Masks are sent behind the numbers of their rows, and are as long as the larger vocabulary, the model's or the tokenizer's;
# a start, which has this compiled, knows the model's.
@triton.jit(do_not_specialize=["num_words"], do_not_specialize_on_alignment=["mask_ptr"])
def forbid_tokens(
    logits_ptr, row_ptr, mask_ptr, logits_stride, num_words, VOCAB: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    """A stretch of one guided row."""
    wait_for_inputs(PDL)
    guided = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(row_ptr + guided).to(tl.int64)
    word = tl.load(mask_ptr + guided * num_words + token // 32, mask=token < VOCAB, other=-1)
    is_forbidden = ((word >> (token % 32)) & 1) == 0
    tl.store(logits_ptr + row * logits_stride + token, -float("inf"), mask=is_forbidden & (token < VOCAB))


def forbid(logits_RV: torch.Tensor, mask_GW: torch.Tensor, row_G: torch.Tensor, traits: GpuTraits) -> None:
    """Set the logits of tokens that are not in their row's mask to -inf.

    Args:
        logits_RV: float32, contiguous along V.
        mask_GW: int32, contiguous.
        row_G: int32, the row of each mask; none occurs twice.
    """
    num_guided, num_words = mask_GW.shape
    vocab_size = logits_RV.shape[-1]
    forbid_tokens[(num_guided, triton.cdiv(vocab_size, _BLOCK_TOKENS))](
        logits_RV,
        row_G,
        mask_GW,
        logits_RV.stride(0),
        num_words,
        VOCAB=vocab_size,
        BLOCK=_BLOCK_TOKENS,
        PDL=traits.dependent_launch,
        num_warps=8,
        **traits.launch_options,
    )
