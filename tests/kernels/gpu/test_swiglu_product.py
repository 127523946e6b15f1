"""The gate-up product with SwiGLU in one kernel, as far as it goes without a GPU: compiled, kept, chosen, refused."""

import dataclasses
from contextlib import nullcontext
from importlib import metadata
from pathlib import Path
from typing import Any, cast

import pytest
import torch

pytest.importorskip("triton")

from cross_compile import AMPERE, HOPPER
from triode.kernels.gpu_traits import GpuTraits
from triode.kernels.swiglu.reference import swiglu as swiglu_reference
from triode.kernels.swiglu_product import nvrtc, product, proof
from triode.kernels.swiglu_product.errors import ProductUnavailable
from triode.kernels.swiglu_product.nvrtc import Nvrtc, compiled
from triode.kernels.swiglu_product.proof import prove_swiglu, tokens_of_tiles
from triode.kernels.swiglu_product.source import headers, options, source
from triode.kernels.swiglu_product.tiles import MEASURED, MOST_SHARED_BYTES, SPEEDS, ProductTile, product_tile
from triode.models.cuda import linears
from triode.models.cuda.linears import GpuGateUp, GpuLinear, Proofs

QWEN, LLAMA = MEASURED
BFLOAT16 = torch.bfloat16


@pytest.fixture(scope="module")
def compiler() -> Nvrtc:
    try:
        distribution = metadata.distribution("nvidia-cuda-nvrtc")
    except metadata.PackageNotFoundError:
        pytest.skip("nvidia-cuda-nvrtc is not installed")
    (library,) = (file for file in distribution.files or () if file.match("libnvrtc.so.*"))
    return Nvrtc(str(distribution.locate_file(library)))


@pytest.mark.parametrize(
    ("tile", "dtype"), [*((tile, BFLOAT16) for tile in SPEEDS), (next(iter(SPEEDS)), torch.float16)], ids=str
)
def test_every_tile_compiles_without_memory_for_what_registers_do_not_hold(
    tile: ProductTile, dtype: torch.dtype, compiler: Nvrtc
) -> None:
    # The assembler reports both sums that are spilled and products that it puts one behind the other.
    told = [*options(tile, dtype), "--ptxas-options=-v"]
    code, log = compiler.compile(source(), headers(tile, dtype), told)
    assert code.startswith(b"\x7fELF")
    assert "0 bytes spill stores, 0 bytes spill loads" in log
    assert "C75" not in log


def test_the_assembler_s_warnings_would_be_seen(compiler: Nvrtc) -> None:
    too_wide = ProductTile(consumers=2, subtiles=2, columns=208, num_stages=3)
    _, log = compiler.compile(
        source(), headers(too_wide, BFLOAT16), [*options(too_wide, BFLOAT16), "--ptxas-options=-v"]
    )
    assert "C75" in log


def test_what_does_not_compile_says_where(compiler: Nvrtc) -> None:
    with pytest.raises(ProductUnavailable, match=r"NVRTC 13\.0: .*error"):
        compiler.compile("no C++", {}, ["--gpu-architecture=sm_90a"])


def test_a_compiler_that_is_not_there_is_named() -> None:
    with pytest.raises(ProductUnavailable, match=r"libnvrtc\.so\.0: "):
        Nvrtc("libnvrtc.so.0")


class CountingCompiler:
    """Compiles nothing, and remembers how often."""

    version = "13.0"

    def __init__(self) -> None:
        self.compiled: list[str] = []

    def compile(self, source: str, headers: object, options: object) -> tuple[bytes, str]:
        self.compiled.append(source)
        return source.encode(), ""


def test_what_is_compiled_is_found_again_until_anything_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    counting = CountingCompiler()
    compiler = cast(Nvrtc, counting)
    for _ in range(2):
        assert compiled("one", {"a.h": "x"}, ["-O"], name="n", nvrtc=compiler) == b"one"
    assert len(counting.compiled) == 1
    compiled("two", {"a.h": "x"}, ["-O"], name="n", nvrtc=compiler)
    compiled("one", {"a.h": "y"}, ["-O"], name="n", nvrtc=compiler)
    compiled("one", {"a.h": "x"}, [], name="n", nvrtc=compiler)
    counting.version = "13.1"
    compiled("one", {"a.h": "x"}, ["-O"], name="n", nvrtc=compiler)
    assert len(counting.compiled) == 5
    assert {path.suffix for path in (tmp_path / "triode" / "cuda").iterdir()} == {".cubin"}


def test_a_cache_that_cannot_be_written_says_what_to_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "triode").write_text("not a folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(ProductUnavailable, match="set XDG_CACHE_HOME"):
        compiled("one", {}, [], name="n", nvrtc=cast(Nvrtc, CountingCompiler()))


@pytest.mark.skipif(torch.version.cuda is not None, reason="torch has CUDA")
def test_torch_without_cuda_brings_no_compiler() -> None:
    with pytest.raises(ProductUnavailable, match="torch is built without CUDA"):
        nvrtc.find_nvrtc()


@pytest.mark.parametrize(
    ("sizes", "num_tokens", "tile", "num_waves"),
    [
        # 72 features wide, the tiles of all of Qwen2.5-7B's 18,944 are two for each of 132 multiprocessors.
        (QWEN, 256, (256, 144), 2),
        (QWEN, 192, (192, 144), 2),
        (QWEN, 128, (128, 288), 1),
        (QWEN, 4096, (256, 192), 24),
        (LLAMA, 256, (128, 224), 2),
        (LLAMA, 128, (128, 224), 1),
    ],
)
def test_tiles_fill_the_gpu_evenly(
    sizes: tuple[int, int], num_tokens: int, tile: tuple[int, int], num_waves: int
) -> None:
    chosen = product_tile(num_tokens, sizes[0], 132)
    assert (chosen.tokens, chosen.rows) == tile
    assert -(-chosen.num_clusters(num_tokens, sizes[0]) // 66) == num_waves


@pytest.mark.parametrize("num_features", [8, 1000, QWEN[0], LLAMA[0]])
def test_every_number_of_tokens_has_a_tile_and_every_token_is_in_one(num_features: int) -> None:
    for num_tokens in (1, 65, 128, 129, 257, 4096):
        tile = product_tile(num_tokens, num_features, 132)
        num_clusters = tile.num_clusters(num_tokens, num_features)
        assert num_clusters * tile.cluster_tokens * tile.cluster_features >= num_tokens * num_features


@pytest.mark.parametrize("tile", SPEEDS, ids=str)
def test_a_tile_fits_into_shared_memory_and_registers(tile: ProductTile) -> None:
    assert tile.shared_bytes <= MOST_SHARED_BYTES
    sums = tile.tokens * tile.rows // (tile.num_threads - 128)
    assert sums <= 200


@pytest.mark.parametrize(
    ("change", "constraint"),
    [
        ({"columns": 200}, "columns must be a multiple of 16 up to 256, got 200"),
        ({"columns": 272}, "columns must be a multiple of 16 up to 256, got 272"),
        ({"columns": 176, "shares_weight": True}, "features must be a multiple of 16 where weights are shared, got 88"),
        ({"num_stages": 5}, "shared memory must be at most 232448 bytes"),
    ],
)
def test_a_tile_that_the_kernel_does_not_have_is_refused(change: dict[str, Any], constraint: str) -> None:
    tile = ProductTile(consumers=2, subtiles=2, columns=192, num_stages=4)
    with pytest.raises(ValueError, match=constraint):
        dataclasses.replace(tile, **change)


def test_the_proof_asks_each_tile_about_the_fewest_and_the_most_tokens_it_serves() -> None:
    served = [*range(65, 257), *range(385, 4097)]
    asked = tokens_of_tiles(QWEN[0], 132, served)
    numbers = [num for num, _ in asked]
    assert {65, 4096} <= set(numbers) <= set(served)
    assert all(product_tile(num, QWEN[0], 132) is tile for num, tile in asked)
    assert {tile for _, tile in asked} == {product_tile(num, QWEN[0], 132) for num in served}


def by_reference(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, *_: object) -> None:
    out.copy_(swiglu_reference(x @ weight.T))


@pytest.fixture
def _on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proof, "in_order", nullcontext)
    monkeypatch.setattr(proof, "linear_blas", lambda x, weight, out: out.copy_(x @ weight.T))
    monkeypatch.setattr(proof, "swiglu", lambda gate_up, out, traits: out.copy_(swiglu_reference(gate_up)))
    monkeypatch.setattr(proof, "swiglu_product", by_reference)


def prove() -> proof.SwigluProof:
    return prove_swiglu(torch.randn(16, 8), HOPPER, range(65, 201))


@pytest.mark.usefixtures("_on_the_cpu")
def test_the_proof_finds_any_element_that_differs_or_was_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    assert prove().agrees
    for spoil in (lambda out: out[-1, -1].add_(1), lambda out: out[0, 0].fill_(torch.nan)):

        def spoiled(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, *_: object, spoil: Any = spoil) -> None:
            by_reference(x, weight, out)
            if len(x) == 200:
                spoil(out)

        monkeypatch.setattr(proof, "swiglu_product", spoiled)
        found = prove()
        assert found.differing_tokens == (200,)
        assert "it differs at (200,) tokens" in str(found)


@pytest.mark.usefixtures("_on_the_cpu")
def test_a_kernel_that_cannot_be_had_is_an_exception_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def unavailable(*_: object) -> None:
        raise ProductUnavailable("libnvrtc.so.13: cannot open shared object file")

    monkeypatch.setattr(proof, "swiglu_product", unavailable)
    monkeypatch.setattr(linears, "takes", lambda *_: True)
    monkeypatch.setitem(MEASURED, (8, 8), (range(65, 300),))
    proofs = Proofs(HOPPER)
    product = GpuLinear(torch.randn(16, 8), None, 32, HOPPER)
    assert not proofs.joins_swiglu(product, 200)
    (told,) = proofs.exceptions()
    assert told.startswith("16 × 8: no product with SwiGLU in one kernel (libnvrtc.so.13: cannot open")


def test_it_serves_only_where_it_was_measured_and_weights_are_as_the_kernel_reads_them() -> None:
    weight = torch.empty(2 * QWEN[0], QWEN[1], dtype=BFLOAT16, device="meta")

    def serves(weight: torch.Tensor, bias: torch.Tensor | None, traits: GpuTraits) -> bool:
        return product.takes(cast(torch.Tensor, _OnGpu(weight)), bias, traits)

    assert serves(weight, None, HOPPER)
    assert not product.takes(weight, None, HOPPER)
    assert not serves(weight, torch.empty(2 * QWEN[0], device="meta"), HOPPER)
    assert not serves(weight, None, AMPERE)
    assert not serves(weight.float(), None, HOPPER)
    assert not serves(weight[: QWEN[0]], None, HOPPER)


class _OnGpu:
    """A tensor's description as if it were on a GPU."""

    is_cuda = True

    def __init__(self, weight: torch.Tensor) -> None:
        self.shape, self.dtype, self.is_contiguous = weight.shape, weight.dtype, weight.is_contiguous

    def data_ptr(self) -> int:
        return 256


def test_few_tokens_many_tokens_and_those_without_this_kernel_each_have_their_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    called: list[str] = []
    for name in ("linear_sequential", "linear_blas", "swiglu", "swiglu_product"):
        monkeypatch.setattr(linears, name, lambda *_, name=name, **__: called.append(name))
    weight = torch.empty(2 * LLAMA[0], LLAMA[1], device="meta")

    def kernels_of(num_tokens: int, joins: bool, triton_tokens: int | None = 32) -> list[str]:
        called.clear()
        scratch = torch.empty(num_tokens, 2 * LLAMA[0], device="meta")
        gate_up = GpuGateUp(GpuLinear(weight, None, triton_tokens, HOPPER), joins)
        gate_up(scratch[:, : LLAMA[1]], scratch, scratch[:, : LLAMA[0]])
        return list(called)

    assert kernels_of(32, True) == kernels_of(64, False) == ["linear_sequential"]
    assert kernels_of(33, True) == kernels_of(256, True) == kernels_of(385, True) == ["swiglu_product"]
    assert kernels_of(65, False) == kernels_of(257, True) == kernels_of(384, True) == ["linear_blas", "swiglu"]
    assert kernels_of(4096, False, triton_tokens=None) == ["linear_sequential"]
