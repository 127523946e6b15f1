"""Does the kernel give the bits of the kernels for which it stands? Ask them, for a weight on this GPU.

M tokens    K in features    N weight rows    F out features
"""

import dataclasses
from collections.abc import Callable, Iterable

import torch

from triode.kernels.gpu_traits import GpuTraits
from triode.kernels.hopper_product.choice import measured_tile, swiglu_product_tile
from triode.kernels.hopper_product.errors import ProductUnavailable
from triode.kernels.hopper_product.product import compile_tiles, hopper_product, swiglu_product
from triode.kernels.hopper_product.tiles import Ending, ProductTile
from triode.kernels.linear.blas import in_order, linear_blas
from triode.kernels.swiglu.gpu import swiglu

_COMPARED_TOKENS = 64
"""At a time, so that no further buffer as large as a step's is asked for."""
_WORDS = {
    Ending.STORE: "it serves no product",
    Ending.ADD: "it adds no product to the residual stream",
    Ending.SWIGLU: "it serves no product with SwiGLU",
}


@dataclasses.dataclass(frozen=True)
class ProductProof:
    """What was found for one weight."""

    ending: Ending
    num_rows: int
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
        why = self.failure or f"its bits differ at {self.differing_tokens} tokens"
        return f"{self.num_rows} × {self.in_features}: the CUDA C++ kernel is left out, {_WORDS[self.ending]} ({why})"


def tiles_of(
    ending: Ending, num_rows: int, in_features: int, num_sms: int, served: Iterable[int]
) -> list[tuple[int, ProductTile]]:
    """Of the numbers of tokens that each tile serves, the least and the largest."""
    numbers: dict[ProductTile, list[int]] = {}
    for num_tokens in served:
        if ending is Ending.SWIGLU:
            tile: ProductTile | None = swiglu_product_tile(num_tokens, num_rows // 2, num_sms)
        else:
            tile = measured_tile(ending, num_tokens, num_rows, in_features)
        if tile is not None:
            numbers.setdefault(tile, []).append(num_tokens)
    return [(num, tile) for tile, nums in numbers.items() for num in sorted({min(nums), max(nums)})]


def prove_product(ending: Ending, weight_NK: torch.Tensor, traits: GpuTraits, served: Iterable[int]) -> ProductProof:
    """Compare all on one random input, with this weight's own values, by every tile that serves. Waits for the device.

    Compiles and loads all of them, so that nothing is left to do while serving.

    Args:
        served: the numbers of tokens for which it is to serve.
    """
    num_rows, in_features = weight_NK.shape
    asked = tiles_of(ending, num_rows, in_features, traits.num_sms, served)
    most_tokens = max((num_tokens for num_tokens, _ in asked), default=0)
    x_MK = torch.randn(most_tokens, in_features, dtype=weight_NK.dtype, device=weight_NK.device)
    product_MN = x_MK.new_empty(most_tokens, num_rows)
    found_MF = x_MK.new_empty(most_tokens, num_rows // ending.rows_of_feature)
    residual_MF = torch.randn_like(found_MF) if ending is Ending.ADD else None
    differing = []
    try:
        compile_tiles(ending, {tile: None for _, tile in asked}, weight_NK.dtype)
        with in_order(weight_NK.device):
            for num_tokens, tile in asked:
                x, product, found = (each[:num_tokens] for each in (x_MK, product_MN, found_MF))
                residual = None if residual_MF is None else residual_MF[:num_tokens]
                # No element keeps what another tile wrote.
                found.fill_(torch.nan)
                if ending is Ending.SWIGLU:
                    swiglu_product(x, weight_NK, found, tile, traits)
                else:
                    hopper_product(x, weight_NK, found, tile, traits, residual_MN=residual)
                linear_blas(x, weight_NK, product)
                if not _equal(found, product, residual, _finish(ending, traits)):
                    differing.append(num_tokens)
    except ProductUnavailable as error:
        return ProductProof(ending, num_rows, in_features, failure=str(error))
    return ProductProof(ending, num_rows, in_features, tuple(differing))


Finish = Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]
"""From some tokens' products, and what they are added to."""


def _finish(ending: Ending, traits: GpuTraits) -> Finish:
    def finish(product: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
        if residual is not None:
            return (product.float() + residual.float()).to(product.dtype)
        if ending is Ending.STORE:
            return product
        activated = product.new_empty(len(product), product.shape[1] // 2)
        swiglu(product, activated, traits)
        return activated

    return finish


def _equal(found: torch.Tensor, product: torch.Tensor, residual: torch.Tensor | None, finish: Finish) -> bool:
    for first in range(0, len(found), _COMPARED_TOKENS):
        some = slice(first, first + _COMPARED_TOKENS)
        expected = finish(product[some], None if residual is None else residual[some])
        if not torch.equal(found[some], expected):
            return False
    return True
