"""Hopper's product kernel has the bits of the two kernels for which it stands. `pytest -m gpu`."""

import itertools
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from triode.kernels.gpu_traits import GpuTraits
from triode.kernels.hopper_product import product
from triode.kernels.hopper_product.choice import MEASURED, SPEEDS, SWIGLU_TOKENS, swiglu_product_tile
from triode.kernels.hopper_product.product import hopper_product, swiglu_product
from triode.kernels.hopper_product.proof import prove_product, tiles_of
from triode.kernels.hopper_product.tiles import Ending, ProductTile
from triode.kernels.linear.blas import in_order, linear_blas
from triode.kernels.linear.gpu import linear_sequential
from triode.kernels.linear.tiles import LinearTile, linear_tile, swiglu_tile
from triode.kernels.rms_norm.gpu import add_rms_norm, rms_norm
from triode.kernels.swiglu.gpu import swiglu

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
@pytest.mark.parametrize("tile", SPEEDS, ids=str)
def test_programs_that_take_several_tiles_have_the_bits_of_few_tokens_at_odd_ends(
    tile: ProductTile, dtype: torch.dtype, traits: GpuTraits
) -> None:
    # Features that no tile divides; steps that never fill the ring, and steps that end in its midst.
    num_features, most_tokens = 20008, 513
    for in_features in (136, 520):
        weight, x = weight_of(num_features, in_features, dtype), random(most_tokens, in_features, dtype=dtype)
        expected, few = x.new_empty(most_tokens, num_features), swiglu_tile(num_features, in_features, 16)
        linear_sequential(x, weight, expected, few, traits, swiglu=True)
        for num_tokens in (40, most_tokens):
            assert tile.num_clusters(num_tokens, 2 * num_features) > traits.num_sms // tile.cluster
            found = by_one(x[:num_tokens], weight, tile, traits)
            assert torch.equal(found, expected[:num_tokens]), (in_features, num_tokens)


def test_no_product_takes_what_was_prepared_for_another_of_its_size(traits: GpuTraits) -> None:
    num_tokens, num_features, in_features = 200, 2048, 512
    tile = swiglu_product_tile(num_tokens, num_features, traits.num_sms)
    xs = [random(num_tokens, in_features, dtype=torch.bfloat16) for _ in range(2)]
    weights = [weight_of(num_features, in_features, torch.bfloat16) for _ in range(2)]
    outs = [xs[0].new_empty(num_tokens, num_features) for _ in range(2)]
    expected = [[by_two_kernels(x, weight, traits) for weight in weights] for x in xs]
    for i, j, k in 2 * list(itertools.product(range(2), repeat=3)):
        for out in outs:
            out.fill_(torch.nan)
        swiglu_product(xs[i], weights[j], outs[k], tile, traits)
        assert torch.equal(outs[k], expected[i][j]), (i, j, k)
        assert outs[1 - k].isnan().all(), (i, j, k)


def measured(ending: Ending) -> list[ProductTile]:
    return [*dict.fromkeys(tile for by_tokens in MEASURED[ending].values() for tile in by_tokens.values() if tile)]


PLAIN = [(ending, tile) for ending in MEASURED for tile in measured(ending)]


def added(product: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
    return product if residual is None else (product.float() + residual.float()).to(product.dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("ending", "tile"), PLAIN, ids=str)
def test_every_plain_tile_has_the_bits_of_few_tokens_and_of_an_addition_behind(
    ending: Ending, tile: ProductTile, dtype: torch.dtype, traits: GpuTraits
) -> None:
    # Features that no tile divides, steps that never fill the ring or end in its midst; some take more than one tile each.
    for num_features, in_features in ((1000, 520), (8, 64), (20008, 136)):
        weight = random(num_features, in_features, dtype=dtype) * 0.02
        x, stream = (random(TAILS[-1], size, dtype=dtype) for size in (in_features, num_features))
        few = x.new_empty(TAILS[-1], num_features)
        linear_sequential(x, weight, few, linear_tile(num_features, in_features, 16), traits)
        for num_tokens in TAILS:
            residual = stream[:num_tokens] if ending is Ending.ADD else None
            out = x.new_full((num_tokens + 1, num_features), torch.nan)
            hopper_product(x[:num_tokens], weight, out[:-1], tile, traits, residual_MN=residual)
            assert torch.equal(out[:-1], added(few[:num_tokens], residual)), (num_features, num_tokens)
            assert out[-1].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ending", MEASURED, ids=str)
def test_a_token_has_its_bits_in_every_plain_product_of_the_large_models(
    ending: Ending, dtype: torch.dtype, traits: GpuTraits
) -> None:
    for sizes in MEASURED[ending]:
        weight, x = random(*sizes, dtype=dtype) * 0.02, random(4096, sizes[1], dtype=dtype)
        whole, few = x.new_empty(4096, sizes[0]), x.new_empty(16, sizes[0])
        with in_order(CUDA):
            linear_blas(x, weight, whole)
        linear_sequential(x[:16], weight, few, linear_tile(*sizes, 16), traits)
        assert torch.equal(few, whole[:16])
        stream = random(4096, sizes[0], dtype=dtype) if ending is Ending.ADD else None
        for num_tokens, tile in tiles_of(ending, *sizes, traits.num_sms, range(1, 4097)):
            residual = None if stream is None else stream[:num_tokens]
            out = torch.full_like(whole[:num_tokens], torch.nan)
            hopper_product(x[:num_tokens], weight, out, tile, traits, residual_MN=residual)
            assert torch.equal(out, added(whole[:num_tokens], residual)), (sizes, num_tokens)


def test_a_sum_with_the_residual_is_normed_as_the_kernel_that_adds_norms_it(traits: GpuTraits) -> None:
    tile = measured(Ending.ADD)[0]
    weight, x = random(4096, 512, dtype=torch.bfloat16) * 0.1, random(300, 512, dtype=torch.bfloat16)
    residual, norm = random(300, 4096, dtype=torch.bfloat16), random(4096, dtype=torch.bfloat16)
    product, total, expected, found = (torch.empty_like(residual) for _ in range(4))
    hopper_product(x, weight, total, tile, traits, residual_MN=residual)
    rms_norm(total, norm, 1e-6, found, traits)
    with in_order(CUDA):
        linear_blas(x, weight, product)
    add_rms_norm(product, residual, norm, 1e-6, expected, traits)
    assert torch.equal(total, residual)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SWIGLU_TOKENS, ids=str)
def test_a_token_has_its_bits_in_every_step_of_the_large_models(
    sizes: tuple[int, int], dtype: torch.dtype, traits: GpuTraits
) -> None:
    weight, x = weight_of(*sizes, dtype), random(4096, sizes[1], dtype=dtype)
    few = x.new_empty(16, sizes[0])
    linear_sequential(x[:16], weight, few, swiglu_tile(*sizes, 16), traits, swiglu=True)
    whole = by_two_kernels(x, weight, traits)
    for num_tokens, tile in tiles_of(Ending.SWIGLU, 2 * sizes[0], sizes[1], traits.num_sms, range(33, 4097)):
        found = by_one(x[:num_tokens], weight, tile, traits)
        assert torch.equal(found, whole[:num_tokens]), num_tokens
        assert torch.equal(found[:16], few)


def test_infinite_and_tiny_sums_come_out_as_they_do_from_two_kernels(traits: GpuTraits) -> None:
    tile = swiglu_product_tile(128, 2048, traits.num_sms)
    x = random(128, 512, dtype=torch.bfloat16)
    x[0], x[1], x[2], x[3] = 0.0, 1e38, -1e38, 1e-38
    weight = weight_of(2048, 512, torch.bfloat16) * 50
    found, expected = by_one(x, weight, tile, traits), by_two_kernels(x, weight, traits)
    # Compared as they are kept: NaN is no more equal to itself than other bits are.
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.nan_to_num(), expected.nan_to_num())


def test_replays_of_a_graph_take_what_is_in_place_by_then(traits: GpuTraits) -> None:
    weight, x = weight_of(2048, 512, torch.bfloat16), random(200, 512, dtype=torch.bfloat16)
    tile, out = swiglu_product_tile(200, 2048, traits.num_sms), x.new_empty(200, 2048)
    swiglu_product(x, weight, out, tile, traits)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        x.mul_(2)
        for _ in range(3):
            swiglu_product(x, weight, out, tile, traits)
    for _ in range(5):
        x.normal_()
        twice = x * 2
        out.fill_(torch.nan)
        graph.replay()
        assert torch.equal(out, by_two_kernels(twice, weight, traits))


class Chain:
    """Kernels that all start while their predecessors run: two inputs by turns go through the same x and out."""

    NUM_FEATURES, HIDDEN, SOURCE, LAST, EPS = 8192, 512, 16384, 256, 1e-6
    TILE = LinearTile(64, 64, 64, 4, 3)
    """Of products whose few programs walk over long rows: for as long, what waits for them has multiprocessors."""

    def __init__(self, num_tokens: int, *, norms: bool, traits: GpuTraits) -> None:
        """With `norms`, one stands between the slow product and the x that it leads to."""
        self._norms, self._traits = norms, traits
        self._tile = swiglu_product_tile(num_tokens, self.NUM_FEATURES, traits.num_sms)
        empty, tokens = partial(torch.empty, dtype=torch.bfloat16, device=CUDA), num_tokens
        self._sources = [random(tokens, self.SOURCE, dtype=torch.bfloat16) for _ in range(2)]
        self._residual_before = random(tokens, self.HIDDEN, dtype=torch.bfloat16)
        self._first = random(self.HIDDEN, self.SOURCE, dtype=torch.bfloat16) * 0.01
        self._weight = weight_of(self.NUM_FEATURES, self.HIDDEN, torch.bfloat16)
        self._last = random(self.LAST, self.NUM_FEATURES, dtype=torch.bfloat16) * 0.02
        self._norm, self._out_norm = (random(n, dtype=torch.bfloat16) for n in (self.HIDDEN, self.NUM_FEATURES))
        self._hidden, self._residual, self._x = (empty(tokens, self.HIDDEN) for _ in range(3))
        self._out = empty(tokens, self.NUM_FEATURES)
        self._normal = [empty(tokens, self.NUM_FEATURES) for _ in range(2)]
        self._results = [empty(tokens, self.LAST) for _ in range(2)]

    def kernels(self) -> list[Callable[[], object]]:
        """In order, yet to be launched."""
        turns = (self._turn(*each) for each in zip(self._sources, self._normal, self._results, strict=True))
        begin = partial(torch.mul, self._residual_before, 1, out=self._residual)
        return [begin, *itertools.chain.from_iterable(turns)]

    def _turn(self, source: torch.Tensor, normal: torch.Tensor, result: torch.Tensor) -> list[Callable[[], object]]:
        linear, traits = partial(linear_sequential, tile=self.TILE, traits=self._traits), self._traits
        before: list[Callable[[], object]] = [partial(linear, source, self._first, self._x)]
        if self._norms:
            added = (self._hidden, self._residual, self._norm, self.EPS, self._x, traits)
            before = [partial(linear, source, self._first, self._hidden), partial(add_rms_norm, *added)]
        return [
            *before,
            partial(swiglu_product, self._x, self._weight, self._out, self._tile, traits),
            partial(rms_norm, self._out, self._out_norm, self.EPS, normal, traits),
            partial(linear, self._out, self._last, result),
        ]

    def run(self) -> None:
        """Launch all."""
        for launch in self.kernels():
            launch()

    def written(self) -> list[torch.Tensor]:
        """All that a run leaves behind."""
        return [self._x, self._out, *self._normal, *self._results, *([self._residual] if self._norms else [])]


@pytest.mark.parametrize(("num_tokens", "norms"), [(48, True), (200, False), (2000, True), (4096, False)])
def test_among_kernels_that_start_early_all_is_as_if_each_waited_for_the_last(
    num_tokens: int, norms: bool, traits: GpuTraits
) -> None:
    chain = Chain(num_tokens, norms=norms, traits=traits)
    for launch in chain.kernels():
        launch()
        torch.cuda.synchronize()
    expected = [each.clone() for each in chain.written()]
    assert all(each.isfinite().all() for each in expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        chain.run()
    for run in (chain.run, graph.replay) * 3:
        for each in chain.written():
            each.fill_(torch.nan)
        run()
        assert all(map(torch.equal, chain.written(), expected))


def test_proofs_and_launches_hold_no_memory(traits: GpuTraits) -> None:
    weight, x = weight_of(2048, 512, torch.bfloat16), random(512, 512, dtype=torch.bfloat16)
    out = x.new_empty(512, 2048)
    allocated = torch.cuda.memory_allocated()
    assert prove_product(Ending.SWIGLU, weight, traits, range(65, 513)).agrees
    for num_tokens in range(65, 513):
        swiglu_product(
            x[:num_tokens], weight, out[:num_tokens], swiglu_product_tile(num_tokens, 2048, traits.num_sms), traits
        )
    assert torch.cuda.memory_allocated() == allocated


def test_a_second_start_compiles_nothing(traits: GpuTraits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", os.fspath(tmp_path))
    weight = weight_of(2048, 512, torch.bfloat16)
    kept = []
    for _ in range(2):
        product._loaded.cache_clear()
        product._prepared.cache_clear()
        assert prove_product(Ending.SWIGLU, weight, traits, range(65, 513)).agrees
        kept.append({path.name: path.stat().st_mtime_ns for path in tmp_path.rglob("*.cubin")})
    assert kept[0]
    assert kept[0] == kept[1]
