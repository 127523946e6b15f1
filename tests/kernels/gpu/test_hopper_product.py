"""Hopper's product kernel, as far as it goes without a GPU: compiled, kept, chosen, refused."""

import dataclasses
import itertools
from collections.abc import Iterator
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
from triode.kernels.hopper_product.choice import MEASURED, SPEEDS, SWIGLU_TOKENS, measured_tile, swiglu_product_tile
from triode.kernels.hopper_product.errors import ProductUnavailable
from triode.kernels.hopper_product.nvrtc import Nvrtc, compiled
from triode.kernels.hopper_product.proof import ProductProof, prove_product, tiles_of
from triode.kernels.hopper_product.source import headers, options, source
from triode.kernels.hopper_product.tiles import MOST_SHARED_BYTES, Ending, ProductTile
from triode.kernels.swiglu.reference import swiglu as swiglu_reference
from triode.models.cuda import linears
from triode.models.cuda.linears import GpuGateUp, GpuLinear, Proofs

QWEN, LLAMA = SWIGLU_TOKENS
BFLOAT16 = torch.bfloat16


@pytest.fixture(scope="module")
def compiler() -> Nvrtc:
    try:
        distribution = metadata.distribution("nvidia-cuda-nvrtc")
    except metadata.PackageNotFoundError:
        pytest.skip("nvidia-cuda-nvrtc is not installed")
    (library,) = (file for file in distribution.files or () if file.match("libnvrtc.so.*"))
    return Nvrtc(str(distribution.locate_file(library)))


def measured(ending: Ending) -> list[ProductTile]:
    """All tiles that serve."""
    if ending is Ending.SWIGLU:
        return list(SPEEDS)
    return [*dict.fromkeys(tile for by_tokens in MEASURED[ending].values() for tile in by_tokens.values() if tile)]


ALL = [(ending, tile) for ending in Ending for tile in measured(ending)]


@pytest.mark.parametrize(
    ("ending", "tile", "dtype"),
    [*((*each, BFLOAT16) for each in ALL), *((ending, measured(ending)[0], torch.float16) for ending in Ending)],
    ids=str,
)
def test_every_tile_compiles_without_memory_for_what_registers_do_not_hold(
    ending: Ending, tile: ProductTile, dtype: torch.dtype, compiler: Nvrtc
) -> None:
    # The assembler reports both sums that are spilled and products that it puts one behind the other.
    told = [*options(tile, ending, dtype), "--ptxas-options=-v"]
    code, log = compiler.compile(source(), headers(tile, dtype), told)
    assert code.startswith(b"\x7fELF")
    assert "0 bytes spill stores, 0 bytes spill loads" in log
    assert "C75" not in log


def test_the_assembler_s_warnings_would_be_seen(compiler: Nvrtc) -> None:
    too_wide = ProductTile(consumers=2, subtiles=2, columns=208, num_stages=3)
    told = [*options(too_wide, Ending.SWIGLU, BFLOAT16), "--ptxas-options=-v"]
    _, log = compiler.compile(source(), headers(too_wide, BFLOAT16), told)
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
    chosen = swiglu_product_tile(num_tokens, sizes[0], 132)
    assert (chosen.tokens, chosen.rows) == tile
    assert -(-chosen.num_clusters(num_tokens, 2 * sizes[0]) // 66) == num_waves


@pytest.mark.parametrize("num_features", [8, 1000, QWEN[0], LLAMA[0]])
def test_every_number_of_tokens_has_a_tile_and_every_token_is_in_one(num_features: int) -> None:
    for num_tokens in (1, 65, 128, 129, 257, 4096):
        tile = swiglu_product_tile(num_tokens, num_features, 132)
        num_clusters = tile.num_clusters(num_tokens, 2 * num_features)
        assert num_clusters * tile.cluster_tokens * tile.cluster_rows >= num_tokens * 2 * num_features


@pytest.mark.parametrize(("ending", "tile"), ALL, ids=str)
def test_a_tile_fits_into_shared_memory_and_registers_and_is_fetched_whole(ending: Ending, tile: ProductTile) -> None:
    assert tile.shared_bytes <= MOST_SHARED_BYTES
    sums = tile.tokens * tile.rows // (tile.num_threads - 128)
    assert sums <= 200
    box_rows = tile.box_groups(ending) * 8 * ending.rows_of_feature
    assert tile.rows % box_rows == 0
    # Each program of a cluster that shares weights has a box to fetch; the copy engine takes up to 256 along an axis.
    assert tile.rows // box_rows >= (tile.cluster if tile.shares_weight else 1)
    assert tile.fetched_tokens in range(8, 257, 8)


@pytest.mark.parametrize(
    ("change", "constraint"),
    [
        ({"columns": 196}, "columns must be a multiple of 8 up to 256, got 196"),
        ({"columns": 264}, "columns must be a multiple of 8 up to 256, got 264"),
        ({"cluster": 5}, "cluster must be 1 to 4, got 5"),
        ({"num_stages": 5}, "shared memory must be at most 232448 bytes"),
    ],
)
def test_a_tile_that_the_kernel_does_not_have_is_refused(change: dict[str, Any], constraint: str) -> None:
    tile = ProductTile(consumers=2, subtiles=2, columns=192, num_stages=4)
    with pytest.raises(ValueError, match=constraint):
        dataclasses.replace(tile, **change)


def test_gates_and_ups_that_do_not_fill_groups_are_refused() -> None:
    tile = ProductTile(consumers=2, subtiles=1, columns=200, num_stages=4)
    assert tile.box_groups(Ending.STORE) == 25
    with pytest.raises(ValueError, match="columns must be a multiple of 16 for swiglu, got 200"):
        tile.box_groups(Ending.SWIGLU)


@pytest.mark.parametrize(
    ("rows", "cluster", "box_rows"), [(112, 2, 56), (128, 4, 32), (112, 4, 16), (120, 4, 24), (88, 3, 8), (56, 2, 8)]
)
def test_programs_that_share_weights_fetch_equal_boxes_by_turns(rows: int, cluster: int, box_rows: int) -> None:
    tile = ProductTile(1, 1, columns=rows, num_stages=4, shares_weight=True, cluster=cluster)
    assert 8 * tile.box_groups(Ending.STORE) == box_rows


@pytest.mark.parametrize("sizes", MEASURED[Ending.STORE], ids=str)
def test_a_measured_product_has_a_tile_or_none_for_every_number_of_tokens(sizes: tuple[int, int]) -> None:
    by_tokens = MEASURED[Ending.STORE][sizes]
    assert all(measured_tile(Ending.STORE, most, *sizes) is tile for most, tile in by_tokens.items())
    least, most = min(by_tokens), max(by_tokens)
    assert measured_tile(Ending.STORE, 1, *sizes) is by_tokens[least]
    assert measured_tile(Ending.STORE, most + 1, *sizes) is None
    assert measured_tile(Ending.STORE, most, 24, 24) is None


def test_the_proof_asks_each_tile_about_the_fewest_and_the_most_tokens_it_serves() -> None:
    served = [*range(65, 257), *range(385, 4097)]
    asked = tiles_of(Ending.SWIGLU, 2 * QWEN[0], QWEN[1], 132, served)
    numbers = [num for num, _ in asked]
    assert {65, 4096} <= set(numbers) <= set(served)
    assert all(swiglu_product_tile(num, QWEN[0], 132) is tile for num, tile in asked)
    assert {tile for _, tile in asked} == {swiglu_product_tile(num, QWEN[0], 132) for num in served}


@pytest.mark.parametrize("ending", MEASURED, ids=str)
def test_the_proof_asks_every_measured_tile(ending: Ending) -> None:
    for sizes, by_tokens in MEASURED[ending].items():
        asked = tiles_of(ending, *sizes, 132, range(1, 4097))
        assert {tile for _, tile in asked} == {tile for tile in by_tokens.values() if tile}
        assert all(measured_tile(ending, num, *sizes) is tile for num, tile in asked)


def by_reference(
    x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, *_: object, residual_MN: torch.Tensor | None = None
) -> None:
    product = x @ weight.T
    if out.shape != product.shape:
        out.copy_(swiglu_reference(product))
    else:
        out.copy_(product if residual_MN is None else product + residual_MN)


SIZES = (16, 8)
SERVED = range(65, 201)


@pytest.fixture
def _on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(proof, "in_order", nullcontext)
    monkeypatch.setattr(proof, "compile_tiles", lambda *_: None)
    monkeypatch.setattr(proof, "linear_blas", lambda x, weight, out: out.copy_(x @ weight.T))
    monkeypatch.setattr(proof, "swiglu", lambda gate_up, out, traits: out.copy_(swiglu_reference(gate_up)))
    for name in ("swiglu_product", "hopper_product"):
        monkeypatch.setattr(proof, name, by_reference)
    for by_tokens in MEASURED.values():
        monkeypatch.setitem(by_tokens, SIZES, {300: next(iter(SPEEDS))})
    monkeypatch.setitem(SWIGLU_TOKENS, (SIZES[0] // 2, SIZES[1]), (range(65, 300),))
    measured_tile.cache_clear()
    yield
    measured_tile.cache_clear()


def prove(ending: Ending) -> ProductProof:
    return prove_product(ending, torch.randn(SIZES), HOPPER, SERVED)


@pytest.mark.usefixtures("_on_the_cpu")
@pytest.mark.parametrize("ending", Ending, ids=str)
def test_the_proof_finds_any_element_that_differs_or_was_not_written(
    ending: Ending, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert prove(ending).agrees
    for spoil in (lambda out: out[-1, -1].add_(1), lambda out: out[0, 0].fill_(torch.nan)):

        def spoiled(
            x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, *_: object, spoil: Any = spoil, **named: Any
        ) -> None:
            by_reference(x, weight, out, **named)
            if len(x) == 200:
                spoil(out)

        for name in ("swiglu_product", "hopper_product"):
            monkeypatch.setattr(proof, name, spoiled)
        found = prove(ending)
        assert found.differing_tokens == (200,)
        assert "its bits differ at (200,) tokens" in str(found)


@pytest.mark.usefixtures("_on_the_cpu")
@pytest.mark.parametrize("ending", Ending, ids=str)
def test_a_kernel_that_cannot_be_had_is_an_exception_with_its_reason(
    ending: Ending, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unavailable(*_: object, **__: object) -> None:
        raise ProductUnavailable("libnvrtc.so.13: cannot open shared object file")

    monkeypatch.setattr(proof, "compile_tiles", unavailable)
    monkeypatch.setattr(linears, "takes", lambda *_: True)
    proofs = Proofs(HOPPER)
    assert not proofs.hopper(ending, GpuLinear(torch.randn(SIZES), None, 32, HOPPER), 200)
    (told,) = proofs.exceptions()
    assert told.startswith("16 × 8: the CUDA C++ kernel is left out, it ")
    assert "(libnvrtc.so.13: cannot open" in told


@pytest.mark.usefixtures("_on_the_cpu")
def test_nothing_is_compared_where_the_kernel_serves_no_number_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linears, "takes", lambda *_: True)
    proofs = Proofs(HOPPER)
    for sizes, most_tokens, ending in (((24, 8), 200, Ending.STORE), (SIZES, 64, Ending.SWIGLU)):
        assert not proofs.hopper(ending, GpuLinear(torch.randn(sizes), None, 32, HOPPER), most_tokens)
    assert not proofs.hopper_serves()
    assert not proofs.exceptions()


def test_tiles_are_compiled_once_each_and_what_fails_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(product, "compiled", lambda *_, name: asked.append(name))
    product.compile_tiles(Ending.SWIGLU, SPEEDS, BFLOAT16)
    assert sorted(asked) == sorted(f"swiglu-{tile.tokens}x{tile.rows}" for tile in SPEEDS)

    def fails(*_: object, name: str) -> None:
        raise ProductUnavailable(name)

    monkeypatch.setattr(product, "compiled", fails)
    with pytest.raises(ProductUnavailable, match="add-"):
        product.compile_tiles(Ending.ADD, SPEEDS, BFLOAT16)


def test_it_serves_only_the_gpus_it_was_measured_on_and_weights_that_it_can_read() -> None:
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
    assert not serves(weight.T, None, HOPPER)


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


def test_a_residual_that_would_be_added_to_twice_or_is_of_another_size_is_refused() -> None:
    x, weight, out = (torch.empty(size, dtype=BFLOAT16) for size in ((2, 64), (16, 64), (2, 16)))
    tile = next(iter(SPEEDS))
    with pytest.raises(ValueError, match="residual must be elsewhere than out"):
        product.hopper_product(x, weight, out, tile, HOPPER, residual_MN=out)
    with pytest.raises(ValueError, match=r"residual must be \(2, 16\), got \(1, 16\)"):
        product.hopper_product(x, weight, out, tile, HOPPER, residual_MN=out.clone()[:1])
    with pytest.raises(ValueError, match="residual must be float16 or bfloat16, and all of one type"):
        product.hopper_product(x, weight, out, tile, HOPPER, residual_MN=out.float())


@pytest.mark.parametrize("changed", range(10))
def test_what_was_prepared_for_one_launch_serves_none_that_differs_in_anything(
    changed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = itertools.count(1)
    monkeypatch.setattr(product, "TensorMap", lambda *_: "map")
    monkeypatch.setattr(product, "_loaded", lambda *_: "kernel")
    monkeypatch.setattr(product, "Launch", lambda *_, **__: next(numbers))
    product._prepared.cache_clear()
    first, second = list(SPEEDS)[:2]
    one = [16, 32, 48, 64, (2, 16, 64), BFLOAT16, first, Ending.STORE, HOPPER, torch.device("cuda", 0)]
    other = [
        *(80, 96, 112, 0, (3, 16, 64), torch.float16, second, Ending.ADD),
        *(dataclasses.replace(HOPPER, num_sms=4), torch.device("cuda", 1)),
    ]
    assert product._prepared(*cast(Any, one)) == product._prepared(*cast(Any, one)) == cast(Any, 1)
    one[changed] = other[changed]
    assert product._prepared(*cast(Any, one)) == cast(Any, 2)
    product._prepared.cache_clear()


class _OnGpu:
    """A tensor's description as if it were on a GPU."""

    is_cuda = True

    def __init__(self, weight: torch.Tensor) -> None:
        self.shape, self.dtype, self.is_contiguous = weight.shape, weight.dtype, weight.is_contiguous

    def data_ptr(self) -> int:
        return 256


def called_kernels(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    called: list[str] = []
    for name in ("linear_sequential", "linear_blas", "swiglu", "swiglu_product"):
        monkeypatch.setattr(linears, name, lambda *_, name=name, **__: called.append(name))

    def one(*_: object, residual_MN: torch.Tensor | None = None) -> None:
        called.append("hopper_product" if residual_MN is None else "hopper_product that adds")

    monkeypatch.setattr(linears, "hopper_product", one)
    return called


def test_few_tokens_many_tokens_and_those_without_this_kernel_each_have_their_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    called = called_kernels(monkeypatch)
    weight = torch.empty(2 * LLAMA[0], LLAMA[1], device="meta")

    def kernels_of(num_tokens: int, joins: bool, triton_tokens: int | None = 32) -> list[str]:
        called.clear()
        scratch = torch.empty(num_tokens, 2 * LLAMA[0], device="meta")
        hopper = frozenset({Ending.SWIGLU} if joins else ())
        gate_up = GpuGateUp(GpuLinear(weight, None, triton_tokens, HOPPER, hopper))
        gate_up(scratch[:, : LLAMA[1]], scratch, scratch[:, : LLAMA[0]])
        return list(called)

    assert kernels_of(32, True) == kernels_of(64, False) == ["linear_sequential"]
    assert kernels_of(33, True) == kernels_of(256, True) == kernels_of(385, True) == ["swiglu_product"]
    assert kernels_of(65, False) == kernels_of(257, True) == kernels_of(384, True) == ["linear_blas", "swiglu"]
    assert kernels_of(4096, False, triton_tokens=None) == ["linear_sequential"]


def test_a_plain_product_is_the_cuda_kernel_s_where_it_was_the_fastest_one_and_was_proven(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tile = next(iter(SPEEDS))
    monkeypatch.setitem(MEASURED[Ending.STORE], SIZES, {64: None, 128: tile})
    monkeypatch.setitem(MEASURED[Ending.ADD], SIZES, {128: None, 256: tile})
    measured_tile.cache_clear()
    called = called_kernels(monkeypatch)
    weight = torch.empty(SIZES, device="meta")

    def kernel_of(num_tokens: int, *endings: Ending) -> str:
        x, out = (torch.empty(num_tokens, size, device="meta") for size in SIZES[::-1])
        product = GpuLinear(weight, None, 32, HOPPER, frozenset(endings))
        if product.adds(num_tokens):
            product.add(x, out, out)
        else:
            product(x, out)
        return called.pop()

    both = (Ending.STORE, Ending.ADD)
    assert kernel_of(32, *both) == "linear_sequential"
    assert kernel_of(64, *both) == kernel_of(128) == kernel_of(257, *both) == "linear_blas"
    assert kernel_of(128, *both) == kernel_of(65, Ending.STORE) == "hopper_product"
    assert kernel_of(129, *both) == kernel_of(256, Ending.ADD) == "hopper_product that adds"
    assert kernel_of(129, Ending.STORE) == "linear_blas"
    measured_tile.cache_clear()
