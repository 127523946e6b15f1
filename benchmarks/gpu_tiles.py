"""Times tiles of the sequential product and of attention on the GPU at hand: where `linear/tiles.py` comes from.

    PYTHONPATH=src:tests/support python benchmarks/gpu_tiles.py

Each product is timed behind an add + RMSNorm, as a layer runs it, because a tile that fetches weights ahead gains from
what precedes it. Kernels are compiled beforehand by as many processes as there are cores, none of which needs the GPU.
"""

import itertools
import multiprocessing
import os
import sys

import torch
from gpu_kernels import (
    DEVICE,
    LLAMA,
    QWEN,
    Shape,
    copies_of,
    graph_us,
    products,
    random,
    time_decode_attention,
    time_prefill_attention,
    unwritten,
)

from cross_compile import HOPPER, launches_compiled_for
from triode.kernels.gpu_traits import GpuTraits
from triode.kernels.linear.blas import linear_blas, split_k_refused
from triode.kernels.linear.gpu import linear_sequential
from triode.kernels.linear.tiles import LinearTile
from triode.kernels.paged_attention.tiles import AttentionTile
from triode.kernels.rms_norm.gpu import add_rms_norm
from triode.kernels.swiglu.gpu import swiglu

PLAIN = {
    16: [(64, 256, 4, 4), (64, 128, 4, 8), (64, 128, 4, 10), (64, 128, 8, 8), (64, 256, 8, 4), (64, 256, 4, 5), (32, 256, 4, 6),
         (32, 256, 4, 8), (32, 512, 8, 4), (32, 128, 4, 12), (32, 128, 4, 8), (128, 128, 8, 5), (16, 512, 2, 4), (16, 512, 1, 3)],
    32: [(64, 128, 4, 6), (64, 128, 4, 8), (64, 128, 8, 8), (64, 256, 4, 4), (128, 128, 8, 5), (128, 64, 8, 6), (32, 256, 4, 6)],
    64: [(64, 128, 4, 5), (64, 128, 4, 7), (64, 128, 8, 6), (128, 64, 4, 6), (128, 64, 8, 8), (128, 128, 8, 4), (64, 64, 4, 10)],
}  # fmt: skip
HALVES = {
    16: [(32, 128, 2, 4), (32, 128, 2, 6), (32, 128, 4, 8), (32, 256, 4, 4), (16, 256, 1, 3), (16, 256, 1, 4), (64, 128, 4, 5), (64, 64, 4, 8), (64, 128, 8, 5)],
    32: [(16, 256, 1, 3), (32, 128, 2, 3), (32, 128, 2, 4), (64, 64, 4, 6), (64, 128, 4, 4), (64, 128, 8, 4), (32, 64, 4, 6)],
    64: [(32, 128, 4, 3), (64, 64, 4, 4), (64, 64, 4, 6), (64, 64, 8, 6), (64, 128, 8, 3), (64, 128, 4, 3), (128, 64, 8, 4)],
}  # fmt: skip


def tiles(tokens: int, swiglu_fused: bool) -> list[LinearTile]:
    chosen = (HALVES if swiglu_fused else PLAIN)[tokens]
    return [LinearTile(rows, tokens, features, warps, stages) for rows, features, warps, stages in chosen]


def compile_ahead(job: tuple[int, int, LinearTile, bool]) -> None:
    out_features, in_features, tile, fused = job
    x = torch.empty(tile.tokens, in_features, dtype=torch.bfloat16)
    weight = torch.empty(out_features, in_features, dtype=torch.bfloat16)
    out = torch.empty(tile.tokens, out_features // (2 if fused else 1), dtype=torch.bfloat16)
    with launches_compiled_for(HOPPER):
        linear_sequential(x, weight, out, tile, HOPPER, swiglu=fused)


def compile_all() -> None:
    jobs = {}
    for shape, tokens in itertools.product((QWEN, LLAMA), PLAIN):
        for name, (_, in_features) in products(shape).items():
            fused = name == "gate_up"
            for tile in tiles(tokens, fused):
                jobs[in_features % tile.features == 0, tile, fused] = (64, in_features, tile, fused)
    with multiprocessing.get_context("fork").Pool(os.cpu_count()) as pool:
        pool.map(compile_ahead, list(jobs.values()), chunksize=1)


def sweep(shape: Shape, name: str, tokens: int, traits: GpuTraits) -> None:
    out_features, in_features = products(shape)[name]
    fused = name == "gate_up"
    weights = copies_of(out_features, in_features)
    num_tokens = 1 if tokens == 16 else tokens
    x = random(num_tokens, in_features)
    out = unwritten(num_tokens, out_features // (2 if fused else 1))
    many, residual, weight_D = (
        unwritten(num_tokens, out_features),
        random(num_tokens, shape.hidden),
        random(shape.hidden),
    )
    hidden = x if in_features == shape.hidden else random(num_tokens, shape.hidden)
    delta = random(num_tokens, shape.hidden)

    def timed(tile: LinearTile) -> float:
        def step() -> None:
            for weight in weights:
                add_rms_norm(delta, residual, weight_D, 1e-6, hidden, traits)
                linear_sequential(x, weight, out, tile, traits, swiglu=fused)

        return graph_us(step, 8) / len(weights)

    def blas() -> None:
        for weight in weights:
            add_rms_norm(delta, residual, weight_D, 1e-6, hidden, traits)
            linear_blas(x, weight, many)
            if fused:
                swiglu(many, out, traits)

    times: dict[LinearTile, float] = {}
    for tile in tiles(tokens, fused):
        try:
            times[tile] = timed(tile)
        except Exception as error:
            print("   ", tile, repr(error)[:90])
    with split_k_refused():
        blas_us = graph_us(blas, 8) / len(weights)
    print(f"{shape.name} {name} M={num_tokens} floor {weights[0].nbytes / 2.98e6:.1f} cuBLASLt {blas_us:.1f}; ", end="")
    row = sorted(times, key=times.__getitem__)
    print(
        "; ".join(f"{(t.rows, t.features, t.num_warps, t.num_stages)} {times[t]:.1f}" for t in row[:8]),
        f"... {times[row[-1]]:.1f}",
        flush=True,
    )


def sweep_attention(shape: Shape, traits: GpuTraits) -> None:
    for pairs, warps, stages in ((16, 4, 3), (64, 4, 2), (64, 4, 3), (64, 4, 4), (64, 4, 6)):
        row = []
        for rows, context in ((1, 384), (1, 1024), (1, 16384), (16, 2048), (64, 512), (256, 512)):
            tile = AttentionTile(pairs, warps, stages)
            row.append(time_decode_attention(shape, rows, context, 2.98, traits, tile).split("|")[3])
        print(f"decode {pairs} pairs {warps} warps {stages} stages: {' '.join(row)} us", flush=True)
    for pairs, warps, stages in ((128, 8, 2), (128, 8, 3), (64, 4, 2), (64, 4, 3)):
        tile = AttentionTile(pairs, warps, stages)
        row = [time_prefill_attention(shape, length, traits, tile).split("|")[3] for length in (1024, 4096)]
        print(f"prefill {pairs} pairs {warps} warps {stages} stages: {' '.join(row)} TFLOP/s", flush=True)


def main() -> None:
    traits = GpuTraits.of(DEVICE)
    if "attention" not in sys.argv:
        compile_all()
        for shape, tokens in itertools.product((QWEN, LLAMA), PLAIN):
            for name in products(shape):
                sweep(shape, name, tokens, traits)
    sweep_attention(QWEN, traits)


if __name__ == "__main__":
    main()
