"""Does the product with SwiGLU give the bits of the two kernels for which it stands? Ask both, for a weight on this GPU.

M tokens    K in features    F out features
"""

import dataclasses
from collections.abc import Iterable

import torch

from triode.kernels.gpu_traits import GpuTraits
from triode.kernels.hopper_product.errors import ProductUnavailable
from triode.kernels.hopper_product.product import swiglu_product
from triode.kernels.hopper_product.tiles import ProductTile, product_tile
from triode.kernels.linear.blas import in_order, linear_blas
from triode.kernels.swiglu.gpu import swiglu


@dataclasses.dataclass(frozen=True)
class SwigluProof:
    """What was found for one weight."""

    out_features: int
    in_features: int
    differing_tokens: tuple[int, ...] = ()
    """The numbers of tokens for which it differs."""
    failure: str = ""
    """Why it cannot be had."""

    @property
    def agrees(self) -> bool:
        """Whether it may serve."""
        return not (self.differing_tokens or self.failure)

    def __str__(self) -> str:
        why = self.failure or f"it differs at {self.differing_tokens} tokens"
        shape = f"{2 * self.out_features} × {self.in_features}"
        return f"{shape}: no product with SwiGLU in one kernel ({why}); cuBLASLt and a kernel for SwiGLU serve"


def prove_swiglu(weight_2FK: torch.Tensor, traits: GpuTraits, served: Iterable[int]) -> SwigluProof:
    """Compare both on one random input, with this weight's own values, by every tile that serves. Waits for the device.

    Compiles and loads all of them, so that nothing is left to do while serving.

    Args:
        served: the numbers of tokens for which it is to serve.
    """
    out_features, in_features = weight_2FK.shape[0] // 2, weight_2FK.shape[1]
    asked = tokens_of_tiles(out_features, traits.num_sms, served)
    most_tokens = max((num_tokens for num_tokens, _ in asked), default=0)
    x_MK = torch.randn(most_tokens, in_features, dtype=weight_2FK.dtype, device=weight_2FK.device)
    product_M2F = x_MK.new_empty(most_tokens, 2 * out_features)
    expected_MF, found_MF = (x_MK.new_empty(most_tokens, out_features) for _ in range(2))
    differing = []
    with in_order(weight_2FK.device):
        for num_tokens, tile in asked:
            x, product, expected, found = (each[:num_tokens] for each in (x_MK, product_M2F, expected_MF, found_MF))
            # No element keeps what another tile wrote.
            found.fill_(torch.nan)
            try:
                swiglu_product(x, weight_2FK, found, tile, traits)
            except ProductUnavailable as error:
                return SwigluProof(out_features, in_features, failure=str(error))
            linear_blas(x, weight_2FK, product)
            swiglu(product, expected, traits)
            if not torch.equal(expected, found):
                differing.append(num_tokens)
    return SwigluProof(out_features, in_features, tuple(differing))


def tokens_of_tiles(num_features: int, num_sms: int, served: Iterable[int]) -> list[tuple[int, ProductTile]]:
    """Of the numbers of tokens that each tile serves, the least and the largest."""
    numbers: dict[ProductTile, list[int]] = {}
    for num_tokens in served:
        numbers.setdefault(product_tile(num_tokens, num_features, num_sms), []).append(num_tokens)
    return [(num, tile) for tile, nums in numbers.items() for num in sorted({min(nums), max(nums)})]
