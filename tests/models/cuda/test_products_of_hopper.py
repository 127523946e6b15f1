"""The CUDA kernel serves a product where its proof agrees, and a runner says so."""

from typing import cast

import pytest
import torch

pytest.importorskip("triton")

from cross_compile import HOPPER
from triode.kernels.hopper_product.proof import ProductProof
from triode.kernels.hopper_product.tiles import Ending
from triode.kernels.linear.proof import LinearProof
from triode.models.cuda import build, linears
from triode.models.cuda.decoder import CudaDecoder
from triode.models.cuda.linears import GpuLinear, Proofs


class BoundDecoder:
    """As much of a decoder as binds a product."""

    device, dtype, traits, max_tokens = torch.device("cpu"), torch.bfloat16, HOPPER, 77

    def __init__(self) -> None:
        self.proofs = Proofs(HOPPER)


def bound(
    monkeypatch: pytest.MonkeyPatch,
    *,
    takes: bool = True,
    differs: frozenset[Ending] = frozenset(),
    blas_differs: bool = False,
) -> tuple[GpuLinear, str]:
    """A product that may be asked for everything, and what the runner says."""

    def prove(ending: Ending, weight: torch.Tensor, _: object, served: list[int]) -> ProductProof:
        assert served == [33, 77], "no more tokens than a step may have"
        return ProductProof(ending, weight.shape[0], weight.shape[1], (33,) if ending in differs else ())

    monkeypatch.setattr(linears, "takes", lambda *_: takes)
    monkeypatch.setattr(linears, "prove_product", prove)
    monkeypatch.setattr(linears, "_hopper_serves", lambda _, num_tokens, *__: num_tokens in (33, 77, 100))
    monkeypatch.setattr(linears, "prove", lambda *_, **__: LinearProof(16, 8, (48,) if blas_differs else ()))
    monkeypatch.setattr(build, "describe_blas", lambda _: "cuBLASLt 13.1 in order")
    decoder = cast(CudaDecoder, BoundDecoder())
    product = CudaDecoder.linear(decoder, torch.empty(16, 8), None, *Ending)
    return product, build._describe(decoder)


def test_a_kernel_that_agrees_serves_and_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    product, told = bound(monkeypatch)
    assert product.hopper == set(Ending)
    assert told == "Triton; cuBLASLt 13.1 in order for products of many tokens or CUDA C++, which computes SwiGLU, too"


@pytest.mark.parametrize("ending", Ending, ids=str)
def test_what_differs_does_not_serve_and_the_reason_is_told(ending: Ending, monkeypatch: pytest.MonkeyPatch) -> None:
    product, told = bound(monkeypatch, differs=frozenset({ending}))
    assert product.hopper == set(Ending) - {ending}
    assert told.endswith(f"too, but for {ProductProof(ending, 16, 8, differing_tokens=(33,))}")


def test_where_all_of_it_differs_the_runner_names_no_such_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    product, told = bound(monkeypatch, differs=frozenset(Ending))
    assert not product.hopper
    assert told.startswith("Triton; cuBLASLt 13.1 in order for products of many tokens, but for 16 × 8: ")


@pytest.mark.parametrize("why_not", [{"takes": False}, {"blas_differs": True}], ids=str)
def test_where_the_kernel_is_not_to_serve_nothing_is_said_of_it(
    why_not: dict[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    product, told = bound(monkeypatch, **why_not)  # type: ignore[arg-type]
    assert not product.hopper
    assert "CUDA C++" not in told


def test_the_product_of_a_shape_is_compared_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Ending] = []

    def prove(ending: Ending, weight: torch.Tensor, *_: object) -> ProductProof:
        asked.append(ending)
        return ProductProof(ending, weight.shape[0], weight.shape[1])

    bound(monkeypatch)
    monkeypatch.setattr(linears, "prove_product", prove)
    decoder = cast(CudaDecoder, BoundDecoder())
    for _ in range(3):
        CudaDecoder.linear(decoder, torch.empty(16, 8), None, Ending.STORE, Ending.ADD)
    assert asked == [Ending.STORE, Ending.ADD]


def test_what_no_number_of_tokens_asks_for_is_looked_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    looked_up: list[tuple[Ending, int]] = []

    def serves(ending: Ending, num_tokens: int, *_: int) -> bool:
        looked_up.append((ending, num_tokens))
        return False

    bound(monkeypatch)
    monkeypatch.setattr(linears, "_hopper_serves", serves)
    decoder = cast(CudaDecoder, BoundDecoder())
    for _ in range(3):
        assert not CudaDecoder.linear(decoder, torch.empty(16, 8), None, Ending.ADD).hopper
    assert len(looked_up) == len(set(looked_up)) == BoundDecoder.max_tokens
