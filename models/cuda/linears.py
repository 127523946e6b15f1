"""Matrix products of one weight: the sequential Triton kernel for few tokens, cuBLASLt in order for many, and on a Hopper
GPU a CUDA kernel where it is the fastest: it may compute SwiGLU, or add to the residual stream, too.

Which of them serves how many tokens follows from the proofs that they agree bit for bit, made once for each shape when
the model is loaded (`triode.kernels.linear.proof`, `triode.kernels.hopper_product.proof`).

    T tokens    D in features    E out features    F half of a gate-up weight's out features
"""

from dataclasses import dataclass

import torch

from triode.kernels.gpu_traits import GpuTraits
from triode.kernels.hopper_product.choice import measured_tile, swiglu_product_serves, swiglu_product_tile
from triode.kernels.hopper_product.product import hopper_product, swiglu_product, takes
from triode.kernels.hopper_product.proof import ProductProof, prove_product
from triode.kernels.hopper_product.tiles import Ending, ProductTile
from triode.kernels.linear.blas import linear_blas
from triode.kernels.linear.gpu import linear_sequential
from triode.kernels.linear.proof import LinearProof, prove
from triode.kernels.linear.tiles import linear_tile, swiglu_tile, swiglu_triton_tokens
from triode.kernels.swiglu.gpu import swiglu


class Proofs:
    """What was found for each shape of weight."""

    def __init__(self, traits: GpuTraits) -> None:
        self._traits = traits
        self._proofs: dict[tuple[int, int, bool, torch.dtype], LinearProof] = {}
        self._of_hopper: dict[tuple[Ending, int, int, torch.dtype], ProductProof | None] = {}

    def of(
        self, weight_ED: torch.Tensor, bias_E: torch.Tensor | None, out_dtype: torch.dtype, most_tokens: int
    ) -> LinearProof:
        """The proof of a weight's shape, made with the first weight of that shape."""
        key = (weight_ED.shape[0], weight_ED.shape[1], bias_E is not None, out_dtype)
        if key not in self._proofs:
            if self._traits.interpreted:
                # cuBLASLt is not there: the sequential kernel serves every number of tokens.
                proof = LinearProof(weight_ED.shape[0], weight_ED.shape[1], (most_tokens,))
            else:
                proof = prove(weight_ED, self._traits, bias_N=bias_E, out_dtype=out_dtype, most_tokens=most_tokens)
            self._proofs[key] = proof
        return self._proofs[key]

    def hopper(self, ending: Ending, product: "GpuLinear", most_tokens: int) -> bool:
        """Whether the CUDA kernel may serve the numbers of tokens for which it is the fastest, with such an ending."""
        weight_ED, (num_rows, num_in) = product.weight_ED, product.weight_ED.shape
        if product.triton_tokens is None or not takes(weight_ED, product.bias_E, self._traits):
            return False
        key = (ending, num_rows, num_in, weight_ED.dtype)
        if key not in self._of_hopper:
            # Thousands of numbers: not to be asked about for each layer.
            served = [num for num in range(1, most_tokens + 1) if _hopper_serves(ending, num, num_rows, num_in)]
            self._of_hopper[key] = prove_product(ending, weight_ED, self._traits, served) if served else None
        proof = self._of_hopper[key]
        return proof is not None and proof.agrees

    def hopper_serves(self) -> bool:
        """Whether the CUDA kernel serves any product."""
        return any(proof is not None and proof.agrees for proof in self._of_hopper.values())

    def exceptions(self) -> list[str]:
        """The shapes for which not all agree, or not all are there."""
        differing = [str(proof) for proof in self._proofs.values() if proof.differing_tokens]
        return differing + [str(proof) for proof in self._of_hopper.values() if proof is not None and not proof.agrees]


def _hopper_serves(ending: Ending, num_tokens: int, num_rows: int, num_in: int) -> bool:
    if ending is Ending.SWIGLU:
        return swiglu_product_serves(num_tokens, num_rows // 2, num_in)
    return measured_tile(ending, num_tokens, num_rows, num_in) is not None


@dataclass(frozen=True, slots=True)
class GpuLinear:
    """`x @ weight.T + bias`."""

    weight_ED: torch.Tensor
    bias_E: torch.Tensor | None
    triton_tokens: int | None
    """The sequential kernel serves up to this many tokens; None: any number."""
    traits: GpuTraits
    hopper: frozenset[Ending] = frozenset()
    """What the CUDA kernel may do, where it is the fastest."""

    def __call__(self, x_TD: torch.Tensor, out_TE: torch.Tensor) -> None:
        """Write the product into `out_TE`, which may be float32."""
        num_tokens, (num_rows, num_in) = len(x_TD), self.weight_ED.shape
        if tile := self._hopper_tile(Ending.STORE, num_tokens):
            hopper_product(x_TD, self.weight_ED, out_TE, tile, self.traits)
        elif self.triton_tokens is None or num_tokens <= self.triton_tokens:
            few = linear_tile(num_rows, num_in, num_tokens)
            linear_sequential(x_TD, self.weight_ED, out_TE, few, self.traits, bias_N=self.bias_E)
        else:
            linear_blas(x_TD, self.weight_ED, out_TE, self.bias_E)

    def adds(self, num_tokens: int) -> bool:
        """Whether a product of so many tokens is done sooner by `add` than by a kernel for the addition behind it."""
        return self._hopper_tile(Ending.ADD, num_tokens) is not None

    def add(self, x_TD: torch.Tensor, residual_TE: torch.Tensor, out_TE: torch.Tensor) -> None:
        """Write the product, rounded, plus the residual into `out_TE`, for a number of tokens that it `adds`."""
        tile = self._hopper_tile(Ending.ADD, len(x_TD))
        assert tile is not None, f"{len(x_TD)} tokens are not added"
        hopper_product(x_TD, self.weight_ED, out_TE, tile, self.traits, residual_MN=residual_TE)

    def _hopper_tile(self, ending: Ending, num_tokens: int) -> ProductTile | None:
        return measured_tile(ending, num_tokens, *self.weight_ED.shape) if ending in self.hopper else None


@dataclass(frozen=True, slots=True)
class GpuGateUp:
    """`silu(gate(x)) * up(x)`, in one kernel for few tokens, and for many where there is one."""

    product: GpuLinear

    def __call__(self, x_TD: torch.Tensor, gate_up_TF2: torch.Tensor, out_TF: torch.Tensor) -> None:
        """Write the activations into `out_TF`; `gate_up_TF2` is scratch."""
        product = self.product
        num_tokens, (num_rows, num_in) = len(x_TD), product.weight_ED.shape
        if Ending.SWIGLU in product.hopper and swiglu_product_serves(num_tokens, num_rows // 2, num_in):
            joined = swiglu_product_tile(num_tokens, num_rows // 2, product.traits.num_sms)
            swiglu_product(x_TD, product.weight_ED, out_TF, joined, product.traits)
        elif product.triton_tokens is None or num_tokens <= swiglu_triton_tokens(num_rows // 2, num_in):
            tile = swiglu_tile(num_rows // 2, num_in, num_tokens)
            linear_sequential(x_TD, product.weight_ED, out_TF, tile, product.traits, bias_N=product.bias_E, swiglu=True)
        else:
            linear_blas(x_TD, product.weight_ED, gate_up_TF2, product.bias_E)
            swiglu(gate_up_TF2, out_TF, product.traits)
