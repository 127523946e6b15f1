"""Do the Triton kernel and cuBLASLt without split-K give the same bits for this weight on this GPU? Ask both.

They were equal for every shape, number of tokens and algorithm tried on an H100, but that is a property of cuBLASLt and of
the GPU, not a law. So each weight shape is checked when a model is loaded; where they differ, the Triton kernel
serves every number of tokens, which is slower above 32 tokens and keeps the promise.

M tokens    K in features    N out features
"""

import dataclasses
import functools
from collections.abc import Callable

import torch

from triode.kernels.gpu_traits import GpuTraits
from triode.kernels.linear.algorithms import measured_tokens
from triode.kernels.linear.blas import in_order, linear_blas
from triode.kernels.linear.cublaslt import CublasLtError
from triode.kernels.linear.gpu import linear_sequential
from triode.kernels.linear.tiles import TRITON_TOKENS, linear_tile, triton_tokens

FEW_TOKENS = (1, 16)
MANY_TOKENS = (48, 65, 100, 128, 256, 512, 1024, 2048, 4096)
"""Besides those that end a range of the table of algorithms, and the largest step."""

Product = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None], None]
"""x, weight, out and bias of `linear_blas`."""


@dataclasses.dataclass(frozen=True)
class LinearProof:
    """What was found for one weight."""

    out_features: int
    in_features: int
    differing_tokens: tuple[int, ...]
    """The numbers of tokens for which cuBLASLt's first or last rows differ from the Triton kernel's, or it failed."""
    failure: str = ""
    """What cuBLASLt said where it failed last."""

    @property
    def triton_tokens(self) -> int | None:
        """The Triton kernel serves up to this many tokens; None where it must serve any number."""
        return None if self.differing_tokens else triton_tokens(self.out_features, self.in_features)

    def __str__(self) -> str:
        shape = f"{self.out_features} × {self.in_features}"
        if self.differing_tokens:
            why = f" ({self.failure})" if self.failure else ""
            differs = f"cuBLASLt differs at {self.differing_tokens} tokens{why}"
            return f"{shape}: {differs}; the Triton kernel serves every number"
        return f"{shape}: cuBLASLt agrees; it serves more than {self.triton_tokens} tokens"


def prove(
    weight_NK: torch.Tensor,
    traits: GpuTraits,
    *,
    bias_N: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    most_tokens: int = MANY_TOKENS[-1],
    product: Product = linear_blas,
) -> LinearProof:
    """Compare both on one random input, with this weight's own values. Waits for the device.

    Args:
        out_dtype: the type of the product where it is not the weight's (float32 logits).
        most_tokens: the largest step; larger products are not checked.
        product: what serves many tokens; one that splits K shows that the check can fail.
    """
    out_features, in_features = weight_NK.shape
    tokens = {*MANY_TOKENS, *measured_tokens(out_features, in_features), most_tokens}
    counts = sorted(count for count in tokens if TRITON_TOKENS < count <= most_tokens) or [MANY_TOKENS[0]]
    new_empty = functools.partial(torch.empty, device=weight_NK.device)
    x_MK = new_empty((counts[-1], in_features), dtype=weight_NK.dtype)
    if not weight_NK.is_meta:
        # torch imports for seconds what it needs to draw what is not there.
        x_MK.normal_()

    def sequential(few_MK: torch.Tensor) -> torch.Tensor:
        out_MN = new_empty((len(few_MK), out_features), dtype=out_dtype or weight_NK.dtype)
        tile = linear_tile(out_features, in_features, len(few_MK))
        linear_sequential(few_MK, weight_NK, out_MN, tile, traits, bias_N=bias_N)
        return out_MN

    first = [sequential(x_MK[:count]) for count in FEW_TOKENS]
    if weight_NK.is_meta:
        # Nothing is computed where kernels are only compiled.
        return LinearProof(out_features, in_features, ())
    many_MN = new_empty((counts[-1], out_features), dtype=out_dtype or weight_NK.dtype)
    differing, failure = [], ""
    with in_order(weight_NK.device):
        for count in counts:
            out_MN = many_MN[:count]
            # No row keeps what a smaller product wrote.
            out_MN.fill_(torch.nan)
            try:
                product(x_MK[:count], weight_NK, out_MN, bias_N)
            except CublasLtError as error:
                differing.append(count)
                failure = str(error)
                continue
            last_MN = sequential(x_MK[count - FEW_TOKENS[-1] : count])
            agree = all(torch.equal(few_MN, out_MN[: len(few_MN)]) for few_MN in first)
            if not (agree and torch.equal(last_MN, out_MN[-len(last_MN) :])):
                differing.append(count)
    return LinearProof(out_features, in_features, tuple(differing), failure)
