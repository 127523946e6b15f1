"""Times tiles of the sequential product and of attention on the GPU at hand: where `linear/tiles.py` comes from.

    PYTHONPATH=src:tests/support python benchmarks/gpu_tiles.py

Products of one token are timed within a chain of whole layers, one product's tile changed at a time: what precedes a
kernel, and how it leaves the multiprocessors, matters as much as its own speed. Products of more tokens are timed behind an
add + RMSNorm. Kernels are compiled beforehand by as many processes as there are cores, none of which needs the GPU.
"""

import dataclasses
import itertools
import multiprocessing
import os
import sys
from contextlib import AbstractContextManager
from typing import TypeAlias
from unittest.mock import patch

import torch
from gpu_kernels import DecodeStep, model_weights, time_decode_attention, time_prefill_attention
from gpu_timing import (
    DEVICE,
    LLAMA,
    QWEN,
    Shape,
    copies_of,
    graph_us,
    products,
    random,
    unwritten,
)

from cross_compile import HOPPER, launches_compiled_for
from triode.kernels.gpu_traits import GpuTraits
from triode.kernels.linear.blas import in_order, linear_blas
from triode.kernels.linear.gpu import linear_sequential
from triode.kernels.linear.tiles import MEASURED, MEASURED_QKV, MEASURED_SWIGLU, LinearTile
from triode.kernels.paged_attention.tiles import AttentionTile
from triode.kernels.rms_norm.gpu import add_rms_norm
from triode.kernels.swiglu.gpu import swiglu

SMALL_QWEN = Shape("Qwen2.5-0.5B", 896, 14, 2, 64, 4864, 151936, 24)
SMOL = Shape("SmolLM2-135M", 576, 9, 3, 64, 1536, 49152, 30)
SHAPES = (QWEN, LLAMA, SMALL_QWEN, SMOL)
ONE_STEP = 1024

Choice: TypeAlias = tuple[int, ...]
"""Rows, features, warps, stages, and features fetched ahead if any are."""
# By the tokens of a tile.
PLAIN: dict[int, list[Choice]] = {
    8: [(32, 128, 2, 6), (32, 256, 2, 6), (32, 256, 4, 8), (32, 512, 4, 4), (16, 256, 2, 8), (16, 256, 1, 4, 512),
        (16, 512, 1, 3), (16, 512, 2, 5), (16, 1024, 2, 3), (16, 1024, 4, 4)],
    16: [(64, 256, 4, 4), (64, 128, 4, 8), (64, 128, 4, 10), (64, 128, 8, 8), (64, 128, 4, 6, 256), (32, 256, 4, 6), (32, 256, 4, 6, 256),
         (32, 256, 4, 8), (32, 512, 8, 4), (128, 128, 8, 5), (16, 512, 2, 4), (16, 512, 1, 3)],
    32: [(64, 128, 4, 6), (64, 128, 4, 8), (64, 128, 8, 8), (64, 256, 4, 4), (128, 128, 8, 5), (128, 64, 8, 6), (32, 256, 4, 6)],
    64: [(64, 128, 4, 5), (64, 128, 4, 7), (64, 128, 8, 6), (128, 64, 4, 6), (128, 64, 8, 8), (128, 128, 8, 4), (64, 64, 4, 10)],
}  # fmt: skip
HALVES: dict[int, list[Choice]] = {
    8: [(16, 256, 1, 3), (16, 256, 1, 3, 256), (16, 256, 2, 4), (16, 256, 2, 6), (16, 512, 1, 3), (16, 512, 2, 3),
        (16, 512, 4, 5), (16, 128, 1, 6), (32, 128, 2, 6), (32, 256, 2, 3), (32, 256, 4, 5)],
    16: [(32, 128, 2, 4), (32, 128, 2, 6), (32, 128, 2, 4, 128), (32, 128, 4, 8), (32, 256, 4, 4), (16, 256, 1, 3), (64, 128, 4, 5), (64, 128, 4, 4, 128)],
    32: [(16, 256, 1, 3), (32, 128, 2, 3), (32, 128, 2, 4), (64, 64, 4, 6), (64, 128, 4, 4), (64, 128, 8, 4), (32, 64, 4, 6)],
    64: [(32, 128, 4, 3), (64, 64, 4, 4), (64, 64, 4, 6), (64, 64, 8, 6), (64, 128, 8, 3), (64, 128, 4, 3), (128, 64, 8, 4)],
}  # fmt: skip
SMALL_PLAIN: list[Choice] = [(16, ONE_STEP, warps, 1, ONE_STEP) for warps in (1, 2, 4)] + [
    (16, 128, 1, 4),
    (16, 256, 2, 4),
    (64, 128, 4, 6),
]
SMALL_HALVES: list[Choice] = [(16, ONE_STEP, warps, 1, ONE_STEP) for warps in (2, 4)] + [
    (16, 128, 1, 4),
    (32, 128, 2, 4),
    (16, 128, 2, 4, 256),
]
LONG_IN: list[Choice] = [
    (16, 256, 4, 6, 2048),
    (16, 256, 4, 6, 1024),
    (16, 256, 4, 8, 512),
    (16, 512, 4, 6),
    (16, 256, 2, 8),
    (64, 128, 4, 6),
]
FUSED: list[Choice] = [
    (16, 128, 1, 6),
    (16, 256, 2, 3),
    (16, 256, 1, 4),
    (16, 256, 2, 6),
    (32, 128, 2, 6),
    (32, 128, 4, 6),
]
"""Of the projection of queries, keys and values: its rows are pairs."""
CHAIN_BYTES = 3 << 30
"""Weights of a chain of layers: enough that L2 does not hold them."""


def tiles(shape: Shape, name: str, tokens: int) -> list[LinearTile]:
    """What is tried for a product; of up to 8 tokens' queries, keys and values, for the fused projection."""
    _, in_features = products(shape)[name]
    chosen = (HALVES if name == "gate_up" else PLAIN)[tokens]
    if name == "qkv" and tokens == 8:
        chosen = FUSED
    if shape.hidden <= ONE_STEP and tokens <= 32:
        chosen = LONG_IN if in_features > ONE_STEP else SMALL_HALVES if name == "gate_up" else SMALL_PLAIN
    return [
        LinearTile(rows, tokens, features, warps, stages, *ahead) for rows, features, warps, stages, *ahead in chosen
    ]


def compile_ahead(job: tuple[int, int, LinearTile, bool]) -> None:
    out_features, in_features, tile, fused = job
    x = torch.empty(tile.tokens, in_features, dtype=torch.bfloat16)
    weight = torch.empty(out_features, in_features, dtype=torch.bfloat16)
    out = torch.empty(tile.tokens, out_features // (2 if fused else 1), dtype=torch.bfloat16)
    with launches_compiled_for(HOPPER):
        linear_sequential(x, weight, out, tile, HOPPER, swiglu=fused)


def compile_all() -> None:
    jobs = {}
    for shape, tokens in itertools.product(SHAPES, PLAIN):
        for name, (_, in_features) in products(shape).items():
            fused = name == "gate_up"
            for tile in tiles(shape, name, tokens):
                jobs[in_features, tile, fused] = (64, in_features, tile, fused)
    with multiprocessing.get_context("fork").Pool(os.cpu_count()) as pool:
        pool.map(compile_ahead, list(jobs.values()), chunksize=1)


def sweep(shape: Shape, name: str, tokens: int, traits: GpuTraits) -> None:
    out_features, in_features = products(shape)[name]
    fused = name == "gate_up"
    weights = copies_of(out_features, in_features)
    x = random(tokens, in_features)
    out = unwritten(tokens, out_features // (2 if fused else 1))
    many, residual, weight_D = (
        unwritten(tokens, out_features),
        random(tokens, shape.hidden),
        random(shape.hidden),
    )
    hidden = x if in_features == shape.hidden else random(tokens, shape.hidden)
    delta = random(tokens, shape.hidden)

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
    for tile in tiles(shape, name, tokens):
        try:
            times[tile] = timed(tile)
        except Exception as error:
            print("   ", tile, repr(error)[:90])
    with in_order(DEVICE):
        blas_us = graph_us(blas, 8) / len(weights)
    print(f"{shape.name} {name} M={tokens} floor {weights[0].nbytes / 2.98e6:.1f} cuBLASLt {blas_us:.1f}; ", end="")
    show(times)


def show(times: dict[LinearTile, float]) -> None:
    row = sorted(times, key=times.__getitem__)
    print(
        "; ".join(f"{(t.rows, t.features, t.num_warps, t.num_stages, t.ahead)} {times[t]:.1f}" for t in row[:8]),
        f"... {times[row[-1]]:.1f}",
        flush=True,
    )


def used_for_one_token(shape: Shape, name: str, tile: LinearTile) -> AbstractContextManager[object]:
    """Inside, steps of one token compute this product with this tile."""
    out_features, in_features = products(shape)[name]
    if name == "qkv":
        return patch.dict(MEASURED_QKV, {(out_features // 2, in_features): tile})
    table = MEASURED_SWIGLU if name == "gate_up" else MEASURED
    size = (out_features // 2 if name == "gate_up" else out_features, in_features)
    return patch.dict(table, {size: table.get(size, {}) | {8: tile}})


def sweep_in_layers(shape: Shape, traits: GpuTraits) -> None:
    """One token's products, each within a chain of layers."""
    layer_bytes = sum(2 * rows * features for name, (rows, features) in products(shape).items() if name != "head")
    chain = dataclasses.replace(shape, num_layers=min(shape.num_layers, CHAIN_BYTES // layer_bytes), vocab=2048)
    step = DecodeStep(chain, 1, 256, traits, model_weights(chain))
    for name in products(shape):
        if name == "head":
            continue
        times: dict[LinearTile, float] = {}
        shipped_us = graph_us(step, 20) / chain.num_layers
        for tile in tiles(shape, name, 8):
            try:
                with used_for_one_token(shape, name, tile):
                    times[tile] = graph_us(step, 20) / chain.num_layers
            except Exception as error:
                print("   ", tile, repr(error)[:90])
        again_us = graph_us(step, 20) / chain.num_layers
        print(f"{shape.name} {name} M=1, us a layer: shipped {shipped_us:.1f} and {again_us:.1f}; ", end="")
        show(times)


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
        for shape in SHAPES:
            sweep_in_layers(shape, traits)
        for shape, tokens in itertools.product(SHAPES, (16, 32, 64)):
            for name in products(shape):
                sweep(shape, name, tokens, traits)
    sweep_attention(QWEN, traits)


if __name__ == "__main__":
    main()
