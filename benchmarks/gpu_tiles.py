"""Times tiles of the sequential product and of attention on the GPU at hand: where `linear/tiles.py` comes from.

    PYTHONPATH=src:tests/support python benchmarks/gpu_tiles.py

Each product is timed behind an add + RMSNorm, as a layer runs it, because a tile that fetches weights ahead gains from
what precedes it. Kernels are compiled beforehand by as many processes as there are cores, none of which needs the GPU.
"""

import dataclasses
import itertools
import multiprocessing
import os

import torch
from gpu_kernels import (
    DEVICE,
    LLAMA,
    QWEN,
    DecodeStep,
    Shape,
    copies_of,
    graph_us,
    model_weights,
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
from triode.kernels.linear.tiles import MEASURED, MEASURED_SWIGLU, LinearTile
from triode.kernels.paged_attention.gpu import AttentionTile
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
PREFETCHES = (256, 512)


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
        for name, (out_features, in_features) in products(shape).items():
            fused = name == "gate_up"
            for tile, prefetch in itertools.product(tiles(tokens, fused), (0, *PREFETCHES)):
                ahead = dataclasses.replace(tile, prefetch_features=prefetch)
                jobs[in_features % tile.features == 0, ahead, fused] = (64, in_features, ahead, fused)
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
    for best in sorted(times, key=times.__getitem__)[:2]:
        for prefetch in PREFETCHES:
            tile = dataclasses.replace(best, prefetch_features=prefetch)
            times[tile] = timed(tile)
    with split_k_refused():
        blas_us = graph_us(blas, 8) / len(weights)
    print(f"{shape.name} {name} M={num_tokens} floor {weights[0].nbytes / 2.98e6:.1f} cuBLASLt {blas_us:.1f}; ", end="")
    row = sorted(times, key=times.__getitem__)
    print(
        "; ".join(
            f"{(t.rows, t.features, t.num_warps, t.num_stages, t.prefetch_features)} {times[t]:.1f}" for t in row[:8]
        ),
        f"... {times[row[-1]]:.1f}",
        flush=True,
    )


def prefetch_in_a_step(shape: Shape, traits: GpuTraits) -> None:
    """What fetching ahead gains where it counts: one product's setting changes, the whole decode step is timed."""
    weights = model_weights(shape)
    step = DecodeStep(shape, 1, 384, traits, weights)
    for name in ("none", "qkv", "o", "down", "gate_up"):
        size = products(shape).get(name, (0, 0))
        table = MEASURED_SWIGLU if name == "gate_up" else MEASURED
        entry = table.get((size[0] // 2, size[1]) if name == "gate_up" else size, {})
        row = []
        for prefetch in (0,) if name == "none" else (0, 128, 256, 512, 1024, 2048):
            before = dict(entry)
            if 16 in entry:
                entry[16] = dataclasses.replace(entry[16], prefetch_features=prefetch)
            row.append(f"{prefetch}: {graph_us(step, 10):.0f}")
            entry.update(before)
        print(f"{shape.name} step, prefetch of {name}: {'; '.join(row)} us", flush=True)


def main() -> None:
    compile_all()
    traits = GpuTraits.of(DEVICE)
    for shape, tokens in itertools.product((QWEN, LLAMA), PLAIN):
        for name in products(shape):
            sweep(shape, name, tokens, traits)
    for shape in (QWEN, LLAMA):
        prefetch_in_a_step(shape, traits)
    for warps, stages in itertools.product((1, 2, 4), (3, 4, 6)):
        for rows, context in ((1, 1024), (1, 16384), (16, 2048), (128, 1024)):
            print(
                warps,
                stages,
                time_decode_attention(QWEN, rows, context, 2.98, traits, AttentionTile(16, warps, stages)),
                flush=True,
            )
    for pairs, warps, stages in (
        (128, 8, 2),
        (128, 8, 3),
        (128, 8, 4),
        (64, 4, 2),
        (64, 4, 3),
        (64, 4, 4),
        (128, 4, 3),
    ):
        print(
            pairs,
            warps,
            stages,
            time_prefill_attention(QWEN, 4096, traits, AttentionTile(pairs, warps, stages)),
            flush=True,
        )


if __name__ == "__main__":
    main()
