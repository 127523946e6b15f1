"""What is named of cuBLASLt's kernels, and who computes products where cuBLASLt cannot be called."""

import itertools
import mmap
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from triode.kernels.linear import blas
from triode.kernels.linear.algorithms import MEASURED, Algorithm, measured_algorithm, measured_tokens
from triode.kernels.linear.blas import blas_of, describe_blas, in_order, linear_blas
from triode.kernels.linear.cublaslt import loaded_library
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
    assert {measured_algorithm(*shape, most) for most in measured_tokens(*shape)} == {*MEASURED[shape].values()} - {
        None
    }
    for last, most in itertools.pairwise(tokens):
        assert measured_algorithm(*shape, last + 1) == measured_algorithm(*shape, most) == MEASURED[shape][most]
    assert measured_algorithm(*shape, tokens[-1] + 1) is None


def test_a_shape_that_was_not_measured_is_left_to_the_heuristic() -> None:
    assert measured_algorithm(64, 64, 128) is None
    assert measured_tokens(64, 64) == ()


@pytest.fixture
def _afresh() -> Iterator[None]:
    blas_of.cache_clear()
    yield
    blas_of.cache_clear()


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
def test_the_library_is_found_where_it_is_loaded_from(tmp_path: Path) -> None:
    path = tmp_path / "with a blank" / "libcublasLt.so.13"
    path.parent.mkdir()
    path.write_bytes(bytes(mmap.PAGESIZE))
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ):
        assert loaded_library() == str(path)
    assert loaded_library() is None


@pytest.mark.usefixtures("_afresh")
def test_a_library_that_cannot_be_loaded_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blas, "loaded_library", lambda: "/nowhere/libcublasLt.so.1")
    assert "/nowhere/libcublasLt.so.1: " in describe_blas(CPU)
