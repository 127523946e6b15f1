"""What is named of cuBLASLt's kernels, and who computes products where cuBLASLt cannot be called."""

import itertools
import mmap
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

pytest.importorskip("triton")

from triode.kernels.gpu_traits import INTERPRETER
from triode.kernels.linear import blas, cublaslt, proof
from triode.kernels.linear.algorithms import MEASURED, Algorithm, measured_algorithm, measured_tokens
from triode.kernels.linear.blas import blas_of, describe_blas, in_order, linear_blas
from triode.kernels.linear.cublaslt import CublasLt, CublasLtError, loaded_library
from triode.kernels.linear.proof import prove
from triode.kernels.linear.tiles import triton_tokens

CPU = torch.device("cpu")
NAMED = [algorithm for by_tokens in MEASURED.values() for algorithm in by_tokens.values() if algorithm is not None]


@pytest.mark.parametrize("algorithm", set(NAMED), ids=str)
def test_every_named_algorithm_has_cublaslt_s_numbers(algorithm: Algorithm) -> None:
    assert algorithm.tile_id > 0
    assert algorithm.cluster_id > 0
    assert 0 <= algorithm.option <= 7


def test_a_tile_and_its_number_go_one_to_one() -> None:
    assert len({algorithm.tile_id for algorithm in NAMED}) == len({(each.features, each.tokens) for each in NAMED})


@pytest.mark.parametrize("shape", MEASURED)
def test_every_entry_serves_some_number_of_tokens(shape: tuple[int, int]) -> None:
    tokens = list(MEASURED[shape])
    assert tokens == sorted(tokens)
    assert tokens[0] > triton_tokens(*shape)
    assert [measured_algorithm(*shape, most) for most in measured_tokens(*shape)] == list(MEASURED[shape].values())
    for last, most in itertools.pairwise(tokens):
        assert measured_algorithm(*shape, last + 1) == measured_algorithm(*shape, most) == MEASURED[shape][most]
    assert measured_algorithm(*shape, tokens[-1] + 1) is None


def test_a_shape_that_was_not_measured_is_left_to_the_heuristic() -> None:
    assert measured_algorithm(64, 64, 128) is None
    assert measured_tokens(64, 64) == ()


@pytest.fixture
def _afresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blas, "_LOADED", {})


@pytest.mark.usefixtures("_afresh")
def test_without_the_library_torch_computes_and_split_k_is_refused_by_its_switches(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    refused: list[bool] = []

    @contextmanager
    def switches() -> Iterator[None]:
        refused.append(True)
        yield
        refused.append(False)

    monkeypatch.setattr(blas, "loaded_library", lambda: None)
    monkeypatch.setattr(blas, "split_k_refused", switches)
    with in_order(CPU):
        assert refused == [True]
        x, weight, bias, out = torch.randn(3, 8), torch.randn(5, 8), torch.randn(5), torch.empty(3, 5)
        linear_blas(x, weight, out, bias)
        torch.testing.assert_close(out, x @ weight.T + bias)
    assert refused == [True, False]
    assert describe_blas(CPU).endswith("(no libcublasLt is loaded)")


@pytest.mark.skipif(loaded_library() is not None, reason="torch has loaded the real one")
@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
@pytest.mark.parametrize("folder", [b"with a blank", b"no text: \xff"])
def test_the_library_is_found_where_it_is_loaded_from(tmp_path: Path, folder: bytes) -> None:
    path = tmp_path / os.fsdecode(folder) / "libcublasLt.so.13"
    path.parent.mkdir()
    path.write_bytes(bytes(mmap.PAGESIZE))
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ):
        assert loaded_library() == str(path)
    assert loaded_library() is None


@pytest.mark.usefixtures("_afresh")
def test_a_library_that_cannot_be_loaded_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blas, "loaded_library", lambda: "/nowhere/libcublasLt.so.1")
    assert "/nowhere/libcublasLt.so.1: " in describe_blas(CPU)


class _Library:
    """What the cache keeps of a library that can be called."""

    version = "13.1.0"

    def __init__(self, path: str, device: torch.device) -> None:
        self.device = device
        self.not_offered: set[object] = set()


@pytest.mark.usefixtures("_afresh")
def test_a_library_that_failed_is_tried_again_and_one_that_is_loaded_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blas, "loaded_library", lambda: None)
    assert blas_of(CPU) == "no libcublasLt is loaded"
    monkeypatch.setattr(blas, "loaded_library", lambda: "here")
    monkeypatch.setattr(blas, "CublasLt", _Library)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    loaded = blas_of(torch.device("cuda"))
    assert isinstance(loaded, _Library)
    assert loaded is blas_of(torch.device("cuda:1")) is not blas_of(torch.device("cuda:0"))


@pytest.mark.usefixtures("_afresh")
def test_kernels_that_are_named_and_not_offered_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blas, "loaded_library", lambda: "here")
    monkeypatch.setattr(blas, "CublasLt", _Library)
    assert describe_blas(CPU) == "cuBLASLt 13.1.0 in order"
    loaded = blas_of(CPU)
    assert isinstance(loaded, _Library)
    loaded.not_offered.add((4608, 3584, NAMED[0]))
    assert describe_blas(CPU) == "cuBLASLt 13.1.0 in order (1 named kernels are not offered)"


BF16 = (torch.bfloat16, torch.bfloat16, torch.bfloat16)


@pytest.mark.parametrize(
    ("shapes", "dtypes", "constraint"),
    [
        ((3, 8, 5, 16, 3, 5), BF16, "x must have the weight's 16 in features, got 8"),
        ((3, 8, 5, 8, 4, 5), BF16, r"out must have the sizes \(3, 5\), got \(4, 5\)"),
        ((3, 8, 5, 8, 3, 6), BF16, r"out must have the sizes \(3, 5\), got \(3, 6\)"),
        ((3, 8, 5, 8, 3, 5), (*BF16[:1], torch.float16, *BF16[:1]), "weight's type must be that of x, .*, got torch.f"),
        ((3, 8, 5, 8, 3, 5), (*BF16[:2], torch.int8), "out must be of .*, got torch.int8"),
    ],
)
def test_sizes_and_types_that_do_not_go_together_are_refused(
    shapes: tuple[int, ...], dtypes: tuple[torch.dtype, torch.dtype, torch.dtype], constraint: str
) -> None:
    with pytest.raises(ValueError, match=constraint):
        cublaslt._checked_shape(shapes, dtypes)


def test_sizes_and_types_that_go_together_are_taken() -> None:
    assert cublaslt._checked_shape((3, 8, 5, 8, 3, 5), (*BF16[:2], torch.float32)) == (3, 5, 8)


def product_by(found: dict[int, list[tuple[int, int, int]]], *, on_hopper: bool) -> tuple[int, int, int] | None:
    """(family, splits, reduction) of what is chosen, of what the heuristic proposes when it is asked for so many."""

    class Plan(cublaslt._Plan):
        def __init__(self) -> None:
            self._lt = cast(CublasLt, SimpleNamespace(_on_hopper=on_hopper))

        def __str__(self) -> str:
            return "a product"

        def _preference(self) -> Any:
            return None

        def _proposals(self, preference: Any, num_asked: int) -> Any:
            return found[num_asked]

        def _setting(self, proposal: Any, attribute: int) -> int:
            return int(proposal[{0: 0, 2: 1, 3: 2}[attribute]])

    try:
        return cast(tuple[int, int, int], Plan()._proposed())
    except CublasLtError:
        return None


OWN, OLDER, SPLITS, REDUCES = (66, 1, 0), (41, 1, 0), (66, 4, 0), (66, 1, 2)


@pytest.mark.parametrize(
    ("found", "on_hopper", "chosen"),
    [
        ({1: [OWN]}, True, OWN),
        ({1: [OLDER]}, False, OLDER),
        ({1: [OLDER], 8: [OLDER, SPLITS, OWN]}, True, OWN),
        ({1: [OLDER], 8: [OLDER, SPLITS]}, True, OLDER),
        ({1: [SPLITS], 8: [SPLITS, REDUCES, OLDER, OWN]}, True, OWN),
        ({1: [SPLITS], 8: [SPLITS, OLDER]}, False, OLDER),
        ({1: [], 8: [SPLITS, REDUCES]}, True, None),
    ],
)
def test_a_product_never_splits_k_and_on_hopper_takes_its_own_kernels_first(
    found: dict[int, list[tuple[int, int, int]]], on_hopper: bool, chosen: tuple[int, int, int] | None
) -> None:
    assert product_by(found, on_hopper=on_hopper) == chosen


def sequential(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, *_: object, bias_N: object) -> None:
    out.copy_(x @ weight.T)


@pytest.mark.parametrize("wrong_row", [None, 0, -1])
def test_the_proof_ends_with_the_largest_step_and_sees_its_first_and_last_rows(
    monkeypatch: pytest.MonkeyPatch, wrong_row: int | None
) -> None:
    asked = []

    def product(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, bias: torch.Tensor | None) -> None:
        assert out.isnan().all()
        asked.append(len(x))
        out.copy_(x @ weight.T)
        if wrong_row is not None and len(x) == 90:
            out[wrong_row, 0] += 1

    monkeypatch.setattr(proof, "linear_sequential", sequential)
    monkeypatch.setattr(proof, "in_order", nullcontext)
    monkeypatch.setattr(proof, "measured_tokens", lambda *_: (80, 96))
    # Small integers: their sums are the same in every order.
    weight = torch.randint(-3, 4, (4, 8)).float()
    monkeypatch.setattr(torch.Tensor, "normal_", lambda x: x.random_(-3, 4))
    found = prove(weight, INTERPRETER, most_tokens=90, product=product)
    assert asked == [48, 65, 80, 90]
    assert found.differing_tokens == (() if wrong_row is None else (90,))


def test_the_proof_tells_why_a_product_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    def product(*_: object) -> None:
        raise CublasLtError("cublasLtMatmul: CUBLAS_STATUS_EXECUTION_FAILED")

    monkeypatch.setattr(proof, "linear_sequential", sequential)
    monkeypatch.setattr(proof, "in_order", nullcontext)
    found = prove(torch.randn(4, 8), INTERPRETER, most_tokens=16, product=product)
    assert found.differing_tokens == (48,)
    assert "cublasLtMatmul: CUBLAS_STATUS_EXECUTION_FAILED" in str(found)
