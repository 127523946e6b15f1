"""Times the gate-up product with SwiGLU in one CUDA kernel beside the two kernels for which it stands (and Triton's, for
few tokens), and its tiles.

    PYTHONPATH=src python benchmarks/gpu_swiglu.py [--models qwen llama] [--tokens 128 256 ...] [--all] [--sustained 0.3]

Bits come first: a tile that differs from the two kernels has no speed. All take turns in CUDA graphs over weights that L2
does not hold; `--all` times every tile, not the chosen one alone. `--sustained` then has the GPU come to its power limit:
each of them runs for that long, by turns.
"""

import argparse
import functools

import torch
from gpu_algorithms import Case, by_turns_us
from gpu_timing import DEVICE, LLAMA, QWEN, Shape, unwritten

from triode.kernels.gpu_traits import GpuTraits
from triode.kernels.hopper_product.choice import SPEEDS, swiglu_product_tile
from triode.kernels.hopper_product.product import swiglu_product
from triode.kernels.hopper_product.tiles import ProductTile
from triode.kernels.linear.blas import describe_blas, in_order, linear_blas
from triode.kernels.linear.gpu import linear_sequential
from triode.kernels.linear.tiles import swiglu_tile
from triode.kernels.swiglu.gpu import swiglu

MODELS = {"qwen": QWEN, "llama": LLAMA}
TRITON_TOKENS = 64
TOKENS = (40, 64, 80, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512, 640, 768, 1024, 2048, 4096)
ROUNDS = 7


def two_kernels(
    traits: GpuTraits, scratch: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor
) -> None:
    linear_blas(x, weight, scratch)
    swiglu(scratch, out, traits)


def by_triton(traits: GpuTraits, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
    tile = swiglu_tile(out.shape[1], x.shape[1], len(x))
    linear_sequential(x, weight, out, tile, traits, swiglu=True)


def one_kernel(traits: GpuTraits, tile: ProductTile, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
    swiglu_product(x, weight, out, tile, traits)


def name(tile: ProductTile) -> str:
    return f"{tile.tokens}x{tile.rows}{' of one weight' if tile.shares_weight else ''}"


def measure(shape: Shape, num_tokens: int, traits: GpuTraits, options: argparse.Namespace) -> None:
    case = Case((2 * shape.intermediate, shape.hidden), num_tokens, torch.bfloat16)
    case.out = unwritten(num_tokens, shape.intermediate)
    scratch = unwritten(num_tokens, 2 * shape.intermediate)
    both = functools.partial(two_kernels, traits, scratch)
    chosen = swiglu_product_tile(num_tokens, shape.intermediate, traits.num_sms)
    tiles = SPEEDS if options.all else [chosen]
    both(case.x, case.weights[0], case.out)
    expected = case.out.clone()
    graphs = {"two kernels": case.graph(both)}
    if num_tokens <= TRITON_TOKENS:
        graphs["Triton"] = case.graph(functools.partial(by_triton, traits))
    for tile in tiles:
        one = functools.partial(one_kernel, traits, tile)
        if case.gives_bits_of(one, expected):
            graphs[name(tile)] = case.graph(one)
        else:
            print(f"{shape.name}, {num_tokens} tokens: {name(tile)} gives other bits")
    for slice_s in (0.0, options.sustained) if options.sustained else (0.0,):
        us = by_turns_us(graphs, len(case.weights), ROUNDS, slice_s)
        found = "; ".join(f"{found} {time:.1f}" for found, time in us.items())
        at = "at the power limit" if slice_s else "cool"
        print(f"{shape.name}, {num_tokens} tokens, {at}, µs: {found}; chosen {name(chosen)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS)
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--sustained", type=float, default=0.0, metavar="S")
    options = parser.parse_args()
    traits = GpuTraits.of(torch.device("cuda", torch.cuda.current_device()))
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {describe_blas(DEVICE)}")
    with in_order(DEVICE), torch.inference_mode():
        for model in options.models:
            for num_tokens in options.tokens:
                measure(MODELS[model], num_tokens, traits, options)


if __name__ == "__main__":
    main()
