"""Times Hopper's product kernel beside those for which it stands: cuBLASLt's named ones, and Triton's for few tokens.

    PYTHONPATH=src python benchmarks/gpu_products.py [--models qwen llama] [--products down ...] [--tokens 128 256 ...]
        [--tiles 64x128/4 128x224 256x192t ...] [--added] [--sustained 0.03]

Bits come first: a tile that differs has no speed. All take turns in CUDA graphs over weights that L2 does not hold. Timed are
the tile that serves and those that are named: tokens by weight rows, how many programs form a cluster (2), and `t` where
these share tokens instead of weights. `--added` adds the product to the residual stream and norms the sum, as a layer
does: in the product's kernel, or in the norm's. Products of 1,024 tokens and more are given a rest before each, and
`--sustained` has each run for so long, by turns, until the GPU is at its power limit.
"""

import argparse
import functools
import itertools
import re
import statistics
import time
from collections.abc import Callable

import torch
from gpu_algorithms import Case, event
from gpu_timing import DEVICE, LLAMA, QWEN, Shape, products, random, unwritten

from triode.kernels.gpu_traits import GpuTraits
from triode.kernels.hopper_product.choice import measured_tile
from triode.kernels.hopper_product.product import compile_tiles, hopper_product
from triode.kernels.hopper_product.tiles import MOST_SHARED_BYTES, Ending, ProductTile
from triode.kernels.linear.blas import describe_blas, in_order, linear_blas
from triode.kernels.linear.gpu import linear_sequential
from triode.kernels.linear.tiles import linear_tile, triton_tokens
from triode.kernels.rms_norm.gpu import add_rms_norm, rms_norm

MODELS = {"qwen": QWEN, "llama": LLAMA}
NAMES = ("qkv", "o", "down")
TOKENS = (40, 64, 96, 128, 192, 256, 512, 1024, 2048, 4096)
ROUNDS, SUSTAINED_ROUNDS = 9, 13
LARGE_TOKENS, REST_S = 1024, 0.012
EPS = 1e-6

Product = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]


def named_tile(name: str) -> ProductTile:
    """As deep a ring as shared memory holds, of up to 12 stages."""
    found = re.fullmatch(r"(\d+)x(\d+)(?:/(\d))?(t?)", name)
    if found is None:
        raise argparse.ArgumentTypeError(f"a tile must be like 64x128/4 or 256x192t, got {name}")
    tokens, rows, shares_tokens = int(found[1]), int(found[2]), bool(found[4])
    consumers, subtiles = {64: (1, 1), 128: (2, 1), 192: (3, 1), 256: (2, 2)}[tokens]
    make = functools.partial(
        ProductTile, consumers, subtiles, rows, shares_weight=not shares_tokens, cluster=int(found[3] or 2)
    )
    stage_bytes = make(num_stages=1).shared_bytes - make(num_stages=0).shared_bytes
    return make(num_stages=min(12, (MOST_SHARED_BYTES - 1280) // stage_bytes))


def name_of(tile: ProductTile) -> str:
    cluster = "" if tile.cluster == 2 else f"/{tile.cluster}"
    return f"{tile.tokens}x{tile.rows}{cluster}{'' if tile.shares_weight else 't'}"


class Layer:
    """What stands around a product: its residual stream, and the norm of the sum."""

    def __init__(self, num_tokens: int, hidden: int, traits: GpuTraits) -> None:
        self.residual, self.norm = random(num_tokens, hidden), random(hidden)
        self.total, self.hidden = unwritten(num_tokens, hidden), unwritten(num_tokens, hidden)
        self._stream, self._traits = self.residual.clone(), traits

    def behind(self, product: Product) -> Product:
        """The addition in the norm's kernel."""

        def run(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
            product(x, weight, out)
            add_rms_norm(out, self._stream, self.norm, EPS, self.hidden, self._traits)

        return run

    def within(self, tile: ProductTile) -> Product:
        """The addition in the product's."""

        def run(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
            hopper_product(x, weight, out, tile, self._traits, residual_MN=self.residual)
            rms_norm(out, self.norm, EPS, self.hidden, self._traits)

        return run


def before(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, *, traits: GpuTraits) -> None:
    """What serves where this kernel does not."""
    sizes = weight.shape[0], weight.shape[1]
    if len(x) <= triton_tokens(*sizes):
        linear_sequential(x, weight, out, linear_tile(*sizes, len(x)), traits)
    else:
        linear_blas(x, weight, out)


def by_turns_us(
    graphs: dict[str, torch.cuda.CUDAGraph], num_weights: int, *, slice_s: float = 0.0, rest_s: float = 0.0
) -> dict[str, float]:
    """Median time of a product. Each is as often the first as any other; at rest or not is the same for all."""
    times: dict[str, list[float]] = {name: [] for name in graphs}
    names = list(graphs)
    for number in range(SUSTAINED_ROUNDS if slice_s else ROUNDS):
        marks = []
        first = number % len(names)
        for name in (names[first:] + names[:first])[:: 1 if number % 2 else -1]:
            if rest_s:
                torch.cuda.synchronize()
                time.sleep(rest_s)
            if not slice_s:
                torch.cuda._sleep(300_000)
            last = min(times[name], default=0.0) * num_weights
            replays = max(1, int(slice_s * 1e6 / last)) if last else 1
            begin = event()
            for _ in range(replays):
                graphs[name].replay()
            marks.append((name, begin, event(), replays))
        torch.cuda.synchronize()
        for name, begin, end, replays in marks:
            times[name].append(begin.elapsed_time(end) * 1e3 / replays / num_weights)
    return {name: statistics.median(found[2:]) for name, found in times.items()}


def measure(shape: Shape, name: str, num_tokens: int, traits: GpuTraits, options: argparse.Namespace) -> None:
    size = products(shape)[name]
    case = Case(size, num_tokens, torch.bfloat16)
    ending = Ending.ADD if options.added else Ending.STORE
    chosen = measured_tile(ending, num_tokens, *size)
    tiles = dict.fromkeys([*([chosen] if chosen else []), *options.tiles])
    compile_tiles(ending, tiles, torch.bfloat16)
    layer = Layer(num_tokens, size[0], traits)
    of_before = functools.partial(before, traits=traits)
    of_before(case.x, case.weights[0], case.out)
    expected = case.out.clone()
    if options.added:
        expected = (expected.float() + layer.residual.float()).to(torch.bfloat16)
    graphs = {"before": case.graph(layer.behind(of_before) if options.added else of_before)}
    for tile in tiles:
        product = layer.within(tile) if options.added else functools.partial(hopper_product, tile=tile, traits=traits)
        if case.gives_bits_of(product, expected):
            graphs[name_of(tile)] = case.graph(product)
        else:
            print(f"{shape.name} {name}, {num_tokens} tokens: {name_of(tile)} gives other bits")
    what = f"{shape.name} {name}{', added and normed' if options.added else ''}, {num_tokens} tokens"
    serves = name_of(chosen) if chosen else "before"
    for slice_s in (0.0, options.sustained) if options.sustained else (0.0,):
        rest_s = REST_S if num_tokens >= LARGE_TOKENS and not slice_s else 0.0
        us = by_turns_us(graphs, len(case.weights), slice_s=slice_s, rest_s=rest_s)
        found = "; ".join(f"{found} {time:.1f}" for found, time in us.items())
        print(f"{what}{', at the power limit' if slice_s else ''}, µs: {found}; {serves} serves", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--products", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS)
    parser.add_argument("--tiles", nargs="+", type=named_tile, default=[])
    parser.add_argument("--added", action="store_true")
    parser.add_argument("--sustained", type=float, default=0.0, metavar="S")
    options = parser.parse_args()
    traits = GpuTraits.of(torch.device("cuda", torch.cuda.current_device()))
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {describe_blas(DEVICE)}")
    with in_order(DEVICE), torch.inference_mode():
        for model, name, num_tokens in itertools.product(options.models, options.products, options.tokens):
            if not (options.added and name == "qkv"):
                measure(MODELS[model], name, num_tokens, traits, options)


if __name__ == "__main__":
    main()
