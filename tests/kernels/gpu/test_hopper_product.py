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
from triode.kernels.hopper_product import nvrtc, product, proof
from triode.kernels.hopper_product.errors import ProductUnavailable
from triode.kernels.hopper_product.nvrtc import Nvrtc, compiled
from triode.kernels.hopper_product.proof import prove_swiglu, tokens_of_tiles
from triode.kernels.hopper_product.source import headers, options, source
from triode.kernels.hopper_product.tiles import MEASURED, MOST_SHARED_BYTES, SPEEDS, ProductTile, product_tile
from triode.kernels.swiglu.reference import swiglu as swiglu_reference
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
    with pytest.raises(ProductUnavailable, match=r"NVRTC 13\.\d+: .*error"):
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


@pytest.mark.parametrize("num_bytes", [0, 10, 33])
def test_a_file_that_was_cut_short_is_compiled_again_and_replaced(
    num_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    counting = CountingCompiler()
    compiler = cast(Nvrtc, counting)
    compiled("one", {}, [], name="n", nvrtc=compiler)
    (file,) = tmp_path.rglob("*.cubin")
    file.write_bytes(file.read_bytes()[:num_bytes])
    for _ in range(2):
        assert compiled("one", {}, [], name="n", nvrtc=compiler) == b"one"
    assert len(counting.compiled) == 2


def _no_folder(folder: Path, _: pytest.MonkeyPatch) -> None:
    folder.parent.mkdir()
    folder.write_text("not a folder")


def _no_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, _: bytes) -> int:
        path.touch()
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(Path, "write_bytes", full)


def _no_home(_: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", home)


@pytest.mark.parametrize("hinder", [_no_folder, _no_file, _no_home])
def test_what_cannot_be_kept_serves_leaves_nothing_behind_and_is_told_once(
    hinder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = tmp_path / "triode" / "cuda"
    hinder(folder, monkeypatch)
    nvrtc._say_once.cache_clear()
    for _ in range(2):
        assert compiled("one", {}, [], name="n", nvrtc=cast(Nvrtc, CountingCompiler())) == b"one"
    (record,) = caplog.records
    assert "set XDG_CACHE_HOME" in record.getMessage()
    assert not folder.is_dir() or not list(folder.iterdir())


def test_a_file_that_may_not_be_read_is_compiled_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(_: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(Path, "read_bytes", forbidden)
    for _ in range(2):
        assert compiled("one", {}, [], name="n", nvrtc=cast(Nvrtc, CountingCompiler())) == b"one"


def test_what_does_not_compile_is_not_taken_for_a_cache_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise ProductUnavailable("NVRTC 13.0: error")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compiler = CountingCompiler()
    monkeypatch.setattr(compiler, "compile", fails)
    with pytest.raises(ProductUnavailable, match=r"^NVRTC 13\.0: error$"):
        compiled("one", {}, [], name="n", nvrtc=cast(Nvrtc, compiler))


@pytest.mark.parametrize("place", ["nvidia/cu13/lib", "nvidia/cuda_nvrtc/lib"])
def test_the_compiler_is_found_beside_the_other_libraries_of_its_packages(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blas = tmp_path / ("nvidia/cublas/lib" if "nvrtc" in place else place) / "libcublasLt.so.12"
    library = tmp_path / place / "libnvrtc.so.12"
    library.parent.mkdir(parents=True)
    library.touch()
    monkeypatch.setattr(torch.version, "cuda", "12.9")
    monkeypatch.setattr(nvrtc, "loaded_library", lambda name: str(blas) if "cublas" in name else None)
    monkeypatch.setattr(nvrtc, "Nvrtc", str)
    assert nvrtc.find_nvrtc.__wrapped__() == cast(Nvrtc, str(library))


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
    # Another number of multiprocessors is filled evenly by other numbers of tokens.
    assert not serves(weight, None, dataclasses.replace(HOPPER, num_sms=114))
    assert not serves(weight.float(), None, HOPPER)
    assert not serves(weight[: QWEN[0]], None, HOPPER)


@pytest.mark.parametrize(
    ("x", "weight", "out", "constraint"),
    [
        ((0, 64), (32, 64), (0, 16), "x must have at least one token, got 0"),
        ((2, 64), (24, 64), (2, 12), "weight must be a multiple of 16 × 8, got 24 × 64"),
        ((2, 60), (32, 60), (2, 16), "weight must be a multiple of 16 × 8, got 32 × 60"),
        ((2, 56), (32, 64), (2, 16), "x must have the weight's 64 in features, got 56"),
        ((2, 64), (32, 64), (2, 32), r"out must be \(2, 16\), got \(2, 32\)"),
    ],
)
def test_sizes_that_the_kernel_does_not_read_are_refused(
    x: tuple[int, int], weight: tuple[int, int], out: tuple[int, int], constraint: str
) -> None:
    x_MK, weight_2FK, out_MF = (torch.empty(size, dtype=BFLOAT16) for size in (x, weight, out))
    with pytest.raises(ValueError, match=constraint):
        product.swiglu_product(x_MK, weight_2FK, out_MF, next(iter(SPEEDS)), HOPPER)


@pytest.mark.parametrize("name", ["x", "weight", "out"])
@pytest.mark.parametrize(
    ("change", "constraint"),
    [
        (lambda tensor: tensor.half(), "must be float16 or bfloat16, and all of one type"),
        (lambda tensor: tensor.float(), "must be float16 or bfloat16, and all of one type"),
        (lambda tensor: tensor.to("meta"), "must be on (cpu|meta), where the weight is"),
        (lambda tensor: torch.empty(tensor.shape[::-1], dtype=BFLOAT16).T, "must be contiguous, got strides"),
        (
            lambda tensor: torch.empty(tensor.numel() + 1, dtype=BFLOAT16)[1:].view(tensor.shape),
            "must begin at a multiple of 16 bytes, got 0x",
        ),
    ],
    ids=["another type", "a type it does not have", "another device", "strided", "unaligned"],
)
def test_a_tensor_that_the_kernel_would_read_wrongly_is_refused(name: str, change: Any, constraint: str) -> None:
    sizes = {"x": (2, 64), "weight": (32, 64), "out": (2, 16)}
    tensors = {each: torch.empty(size, dtype=BFLOAT16) for each, size in sizes.items()}
    tensors[name] = change(tensors[name])
    with pytest.raises(ValueError, match=constraint):
        product.swiglu_product(tensors["x"], tensors["weight"], tensors["out"], next(iter(SPEEDS)), HOPPER)


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
