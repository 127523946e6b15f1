"""The gate-up product with SwiGLU in one kernel has the bits of the two kernels for which it stands. `pytest -m gpu`."""

import os
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from triode.kernels.gpu_traits import GpuTraits
from triode.kernels.linear.blas import in_order, linear_blas
from triode.kernels.linear.gpu import linear_sequential
from triode.kernels.linear.tiles import swiglu_tile
from triode.kernels.swiglu.gpu import swiglu
from triode.kernels.swiglu_product import product
from triode.kernels.swiglu_product.product import swiglu_product
from triode.kernels.swiglu_product.proof import prove_swiglu, tokens_of_tiles
from triode.kernels.swiglu_product.tiles import MEASURED, SPEEDS, ProductTile, product_tile

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore")]

CUDA = torch.device("cuda", 0)
DTYPES = (torch.bfloat16, torch.float16)
TAILS = (1, 63, 64, 65, 127, 128, 129, 200, 256, 257, 300, 513)


@pytest.fixture(scope="module")
def traits() -> GpuTraits:
    traits = GpuTraits.of(CUDA)
    if not traits.warp_group_products:
        pytest.skip("only Hopper has this kernel")
    return traits


def random(*size: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(*size, dtype=dtype, device=CUDA).normal_()


def weight_of(num_features: int, in_features: int, dtype: torch.dtype) -> torch.Tensor:
    return random(2 * num_features, in_features, dtype=dtype) * 0.02


def by_two_kernels(x: torch.Tensor, weight: torch.Tensor, traits: GpuTraits) -> torch.Tensor:
    gate_up, out = x.new_empty(len(x), len(weight)), x.new_empty(len(x), len(weight) // 2)
    with in_order(CUDA):
        linear_blas(x, weight, gate_up)
    swiglu(gate_up, out, traits)
    return out


def by_one(x: torch.Tensor, weight: torch.Tensor, tile: ProductTile, traits: GpuTraits) -> torch.Tensor:
    out = x.new_full((len(x) + 1, len(weight) // 2), torch.nan)
    swiglu_product(x, weight, out[:-1], tile, traits)
    assert out[-1].isnan().all()
    return out[:-1]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tile", SPEEDS, ids=str)
def test_every_tile_has_the_bits_of_two_kernels_for_any_number_of_tokens(
    tile: ProductTile, dtype: torch.dtype, traits: GpuTraits
) -> None:
    # Features that no tile divides, and in features that no stage divides.
    for num_features, in_features in ((1000, 520), (2048, 512), (8, 64)):
        weight, x = weight_of(num_features, in_features, dtype), random(TAILS[-1], in_features, dtype=dtype)
        for num_tokens in TAILS:
            found = by_one(x[:num_tokens], weight, tile, traits)
            assert torch.equal(found, by_two_kernels(x[:num_tokens], weight, traits)), (num_features, num_tokens)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", MEASURED, ids=str)
def test_a_token_has_its_bits_in_every_step_of_the_large_models(
    sizes: tuple[int, int], dtype: torch.dtype, traits: GpuTraits
) -> None:
    weight, x = weight_of(*sizes, dtype), random(4096, sizes[1], dtype=dtype)
    few = x.new_empty(16, sizes[0])
    linear_sequential(x[:16], weight, few, swiglu_tile(*sizes, 16), traits, swiglu=True)
    whole = by_two_kernels(x, weight, traits)
    for num_tokens, tile in tokens_of_tiles(sizes[0], traits.num_sms, range(33, 4097)):
        found = by_one(x[:num_tokens], weight, tile, traits)
        assert torch.equal(found, whole[:num_tokens]), num_tokens
        assert torch.equal(found[:16], few)


def test_infinite_and_tiny_sums_come_out_as_they_do_from_two_kernels(traits: GpuTraits) -> None:
    tile = product_tile(128, 2048, traits.num_sms)
    x = random(128, 512, dtype=torch.bfloat16)
    x[0], x[1], x[2], x[3] = 0.0, 1e38, -1e38, 1e-38
    weight = weight_of(2048, 512, torch.bfloat16) * 50
    found, expected = by_one(x, weight, tile, traits), by_two_kernels(x, weight, traits)
    # Compared as they are kept: NaN is no more equal to itself than other bits are.
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.nan_to_num(), expected.nan_to_num())


def test_replays_of_a_graph_take_what_is_in_place_by_then(traits: GpuTraits) -> None:
    weight, x = weight_of(2048, 512, torch.bfloat16), random(200, 512, dtype=torch.bfloat16)
    tile, out = product_tile(200, 2048, traits.num_sms), x.new_empty(200, 2048)
    swiglu_product(x, weight, out, tile, traits)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        # What is written right before is what is read: the kernel may begin early, and waits.
        x.mul_(2)
        for _ in range(3):
            swiglu_product(x, weight, out, tile, traits)
    for _ in range(5):
        x.normal_()
        twice = x * 2
        out.fill_(torch.nan)
        graph.replay()
        assert torch.equal(out, by_two_kernels(twice, weight, traits))


def test_proofs_and_launches_hold_no_memory(traits: GpuTraits) -> None:
    weight, x = weight_of(2048, 512, torch.bfloat16), random(512, 512, dtype=torch.bfloat16)
    out = x.new_empty(512, 2048)
    allocated = torch.cuda.memory_allocated()
    assert prove_swiglu(weight, traits, range(65, 513)).agrees
    for num_tokens in range(65, 513):
        swiglu_product(x[:num_tokens], weight, out[:num_tokens], product_tile(num_tokens, 2048, traits.num_sms), traits)
    assert torch.cuda.memory_allocated() == allocated


def test_a_second_start_compiles_nothing(traits: GpuTraits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", os.fspath(tmp_path))
    weight = weight_of(2048, 512, torch.bfloat16)
    kept = []
    for _ in range(2):
        product._loaded.cache_clear()
        product._prepared.cache_clear()
        assert prove_swiglu(weight, traits, range(65, 513)).agrees
        kept.append({path.name: path.stat().st_mtime_ns for path in tmp_path.rglob("*.cubin")})
    assert kept[0]
    assert kept[0] == kept[1]
