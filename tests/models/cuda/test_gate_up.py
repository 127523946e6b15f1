"""The product with SwiGLU serves where its proof agrees, and a runner says so."""

from types import SimpleNamespace
from typing import cast

import pytest
import torch

pytest.importorskip("triton")

from cross_compile import HOPPER
from triode.kernels.hopper_product.proof import SwigluProof
from triode.models.cuda import build, linears
from triode.models.cuda.decoder import CudaDecoder
from triode.models.cuda.linears import GpuLinear, Proofs

AGREES = SwigluProof(8, 8)
DIFFERS = SwigluProof(8, 8, differing_tokens=(33,))


class BoundDecoder:
    """As much of a decoder as binds a gate-up product."""

    device, max_tokens = torch.device("cpu"), 512

    def __init__(self) -> None:
        self.proofs = Proofs(HOPPER)

    def linear(self, weight_ED: torch.Tensor, bias_E: torch.Tensor | None) -> GpuLinear:
        return GpuLinear(weight_ED, bias_E, 32, HOPPER)


def bound(proof: SwigluProof | None, monkeypatch: pytest.MonkeyPatch) -> tuple[bool, str]:
    """Whether one kernel serves, and what the runner says; without a proof the kernel does not take the weight."""
    monkeypatch.setattr(linears, "takes", lambda *_: proof is not None)
    monkeypatch.setattr(linears, "prove_swiglu", lambda *_: proof)
    monkeypatch.setattr(build, "describe_blas", lambda _: "cuBLASLt 13.1 in order")
    decoder = cast(CudaDecoder, BoundDecoder())
    gate_up = CudaDecoder.gate_up(decoder, torch.empty(16, 8), None)
    return gate_up.joins_swiglu, build._describe(decoder)


def test_a_kernel_that_agrees_serves_and_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    serves, told = bound(AGREES, monkeypatch)
    assert serves
    assert told == "Triton; cuBLASLt 13.1 in order for products of many tokens, CUDA C++ for those with SwiGLU"


def test_a_kernel_that_differs_does_not_serve_and_the_reason_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    serves, told = bound(DIFFERS, monkeypatch)
    assert not serves
    assert told == f"Triton; cuBLASLt 13.1 in order for products of many tokens, but for {DIFFERS}"


def test_where_the_kernel_takes_no_weight_nothing_is_said_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert bound(None, monkeypatch) == (False, "Triton; cuBLASLt 13.1 in order for products of many tokens")


def test_a_proof_asks_for_as_many_tokens_as_a_step_may_have(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    decoder = BoundDecoder()
    monkeypatch.setattr(decoder.proofs, "joins_swiglu", lambda _, most_tokens: asked.append(most_tokens))
    CudaDecoder.gate_up(
        cast(CudaDecoder, SimpleNamespace(**vars(decoder), linear=decoder.linear, max_tokens=77)),
        torch.empty(16, 8),
        None,
    )
    assert asked == [77]
