"""The GPU kernels on the GPU at hand: right, the same bits for every batch, and how fast. One run prints every table.

    PYTHONPATH=src python benchmarks/gpu_kernels.py

Timing comes behind the gates: a kernel that is wrong has no speed (`--anyway` times it nevertheless). Times are medians
of CUDA graph replays; weights and KV pools rotate, so that they come from memory and not from L2.
"""

import functools
import itertools
import math
import sys
from collections.abc import Iterator

import torch
import triton
from gpu_gates import AttentionCase, EpilogueRun, Gate, gate_attention, gate_linear, gate_rows
from gpu_timing import (
    BLOCK,
    DEVICE,
    LLAMA,
    QWEN,
    Shape,
    copies_of,
    graph_us,
    int32,
    products,
    random,
    read_tb_s,
    unwritten,
)

from triode.kernels.gpu_traits import GpuTraits
from triode.kernels.hopper_product.choice import swiglu_product_serves, swiglu_product_tile
from triode.kernels.hopper_product.product import swiglu_product, takes
from triode.kernels.linear.blas import in_order, linear_blas, linear_torch
from triode.kernels.linear.gpu import linear_sequential
from triode.kernels.linear.proof import Product
from triode.kernels.linear.tiles import (
    QKV_FUSED_TOKENS,
    linear_tile,
    qkv_tile,
    swiglu_tile,
    swiglu_triton_tokens,
    triton_tokens,
)
from triode.kernels.paged_attention.gpu import AttentionWorkspace, paged_attention
from triode.kernels.paged_attention.tiles import SEGMENT_TOKENS, AttentionTile, decode_tile, splits_for
from triode.kernels.qkv_epilogue.fused import qkv_fused
from triode.kernels.qkv_epilogue.gpu import qkv_epilogue
from triode.kernels.rms_norm.gpu import add_rms_norm
from triode.kernels.swiglu.gpu import swiglu


def time_linear(shape: Shape, num_tokens: int, peak_tb_s: float, traits: GpuTraits) -> Iterator[str]:
    for name, (out_features, in_features) in products(shape).items():
        weights = copies_of(out_features, in_features)
        fused = name == "gate_up"
        x = random(num_tokens, in_features)
        out, half = unwritten(num_tokens, out_features), unwritten(num_tokens, out_features // 2)

        def sequential(
            weights: list[torch.Tensor] = weights,
            x: torch.Tensor = x,
            out: torch.Tensor = half if fused else out,
            fused: bool = fused,
        ) -> None:
            rows, features = weights[0].shape
            tile = swiglu_tile(rows // 2, features, num_tokens) if fused else linear_tile(rows, features, num_tokens)
            for weight in weights:
                linear_sequential(x, weight, out, tile, traits, swiglu=fused)

        def blas(
            weights: list[torch.Tensor] = weights,
            x: torch.Tensor = x,
            out: torch.Tensor = out,
            half: torch.Tensor = half,
            fused: bool = fused,
            product: Product = linear_blas,
        ) -> None:
            for weight in weights:
                product(x, weight, out, None)
                if fused:
                    swiglu(out, half, traits)

        with in_order(DEVICE):
            ordered = graph_us(blas) / len(weights)
        default = graph_us(functools.partial(blas, product=linear_torch)) / len(weights)
        ours = graph_us(sequential) / len(weights)
        most = (
            swiglu_triton_tokens(out_features // 2, in_features) if fused else triton_tokens(out_features, in_features)
        )
        used = ours if num_tokens <= most else ordered
        tb_s = weights[0].nbytes / used / 1e6
        yield (
            f"| {shape.name} {name}{' + SwiGLU' if fused else ''} | {num_tokens} | {ours:.1f} | {ordered:.1f} | "
            f"{default:.1f} | {tb_s:.2f} | {tb_s / peak_tb_s:.0%} |"
        )


def time_decode_attention(
    shape: Shape, num_rows: int, context: int, peak_tb_s: float, traits: GpuTraits, tile: AttentionTile | None = None
) -> str:
    blocks_a_row = context // BLOCK
    pool = (num_rows * blocks_a_row + 1, BLOCK, shape.num_kv_heads, shape.head_dim)
    pool_bytes = 4 * math.prod(pool)
    pools = [(random(*pool), random(*pool)) for _ in range(max(1, min(28, int(4e8 // pool_bytes) + 1)))]
    table = (torch.randperm(num_rows * blocks_a_row, device=DEVICE) + 1).int().view(num_rows, blocks_a_row)
    q = random(num_rows, shape.num_heads, shape.head_dim)
    out = torch.empty_like(q)
    tile = tile or decode_tile(shape.num_heads // shape.num_kv_heads, shape.head_dim, torch.bfloat16, traits)
    segments = math.ceil(context / SEGMENT_TOKENS)
    num_splits = splits_for(num_rows, shape.num_kv_heads, segments, traits)
    workspace = AttentionWorkspace.allocate(
        num_rows * shape.num_kv_heads, segments, shape.num_heads // shape.num_kv_heads, shape.head_dim, DEVICE
    )
    query_start = torch.arange(num_rows + 1, device=DEVICE).int()
    start = torch.full((num_rows,), context - 1, device=DEVICE).int()

    def step() -> None:
        for key, value in pools:
            paged_attention(
                q,
                key,
                value,
                table,
                query_start,
                start,
                out,
                scale=shape.head_dim**-0.5,
                max_query_tokens=1,
                traits=traits,
                num_splits=num_splits,
                workspace=workspace,
                tile=tile,
            )

    us = graph_us(step) / len(pools)
    tb_s = pool_bytes / us / 1e6
    return f"| {shape.name} decode {num_rows} × {context} | {num_splits} | {us:.1f} | {tb_s:.2f} | {tb_s / peak_tb_s:.0%} |"


def time_prefill_attention(shape: Shape, length: int, traits: GpuTraits, tile: AttentionTile | None = None) -> str:
    run = AttentionCase(shape.num_heads, shape.num_kv_heads, shape.head_dim, length=length).build(traits)
    out = torch.empty_like(run.q_TNH)
    starts, rows = int32([0]), int32([0, length])
    us = graph_us(lambda: run._attend(run.q_TNH, rows, starts, out, length, 1, tile), 8)
    heads = [x.transpose(0, 1)[None] for x in (run.q_TNH, random(length, shape.num_heads, shape.head_dim))]
    torch_us = graph_us(
        lambda: torch.nn.functional.scaled_dot_product_attention(heads[0], heads[1], heads[1], is_causal=True), 8
    )
    tflop = 2 * 2 * shape.num_heads * shape.head_dim * length**2 / 2 / 1e12
    return f"| {shape.name} prefill {length} | {us:.0f} | {tflop / us * 1e6:.0f} | {tflop / torch_us * 1e6:.0f} |"


def time_rows(shape: Shape, num_tokens: int, traits: GpuTraits) -> Iterator[str]:
    x, residual, weight = (random(num_tokens, shape.hidden) for _ in range(3))
    out = torch.empty_like(x)
    gate_up, half = random(num_tokens, 2 * shape.intermediate), unwritten(num_tokens, shape.intermediate)
    run = EpilogueRun(shape, num_tokens, False, traits)
    pool = (num_tokens // BLOCK + 2, BLOCK, shape.num_kv_heads, shape.head_dim)
    key, value = random(*pool), random(*pool)
    tables = (run.cos, run.sin, run.position, run.slot)

    def norms() -> None:
        for _ in range(20):
            add_rms_norm(x, residual, weight[0], 1e-6, out, traits)

    def epilogues() -> None:
        for _ in range(20):
            qkv_epilogue(run.qkv, *tables, key, value, shape.num_heads, traits, bias_E=run.bias)

    def swiglus() -> None:
        for _ in range(20):
            swiglu(gate_up, half, traits)

    us = [graph_us(step) / 20 for step in (norms, epilogues, swiglus)]
    yield f"| {shape.name} | {num_tokens} | {us[0]:.2f} | {us[1]:.2f} | {us[2]:.2f} |"


class DecodeStep:
    """Every kernel of a decode step's layers and head, in order, over random weights."""

    def __init__(
        self, shape: Shape, num_rows: int, context: int, traits: GpuTraits, weights: dict[str, list[torch.Tensor]]
    ):
        self.shape, self.traits, self.weights = shape, traits, weights
        blocks_a_row = context // BLOCK
        num_blocks = num_rows * blocks_a_row + 1
        self.pools = [
            [random(num_blocks, BLOCK, shape.num_kv_heads, shape.head_dim) for _ in range(2)]
            for _ in range(
                min(shape.num_layers, int(16e9 // (num_blocks * BLOCK * shape.num_kv_heads * shape.head_dim * 4)) + 1)
            )
        ]
        self.table = (torch.randperm(num_blocks - 1, device=DEVICE) + 1).int().view(num_rows, blocks_a_row)
        self.query_start = torch.arange(num_rows + 1, device=DEVICE).int()
        self.start = torch.full((num_rows,), context - 1, device=DEVICE).int()
        self.slot = self.table[:, -1].long() * BLOCK + BLOCK - 1
        self.residual, self.x, self.norm_weight = (random(num_rows, shape.hidden) for _ in range(3))
        self.hidden = random(num_rows, shape.hidden)
        self.qkv = unwritten(num_rows, shape.qkv)
        self.attended = unwritten(num_rows, shape.num_heads, shape.head_dim)
        self.gate_up, self.half = unwritten(num_rows, 2 * shape.intermediate), unwritten(num_rows, shape.intermediate)
        self.logits = unwritten(num_rows, shape.vocab)
        angle = torch.rand(context, shape.head_dim // 2, device=DEVICE)
        self.cos, self.sin, self.bias = angle.cos(), angle.sin(), random(shape.qkv)
        segments = math.ceil(context / SEGMENT_TOKENS)
        self.num_splits = splits_for(num_rows, shape.num_kv_heads, segments, traits)
        group = shape.num_heads // shape.num_kv_heads
        self.workspace = AttentionWorkspace.allocate(
            num_rows * shape.num_kv_heads, segments, group, shape.head_dim, DEVICE
        )

    def linear(self, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
        if x.shape[0] <= triton_tokens(weight.shape[0], weight.shape[1]):
            linear_sequential(x, weight, out, linear_tile(weight.shape[0], weight.shape[1], x.shape[0]), self.traits)
        else:
            linear_blas(x, weight, out)

    def project_qkv(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        shape, weight = self.shape, self.weights["qkv"][layer]
        places = (self.cos, self.sin, self.start, self.slot, key, value, shape.num_heads)
        if self.x.shape[0] <= QKV_FUSED_TOKENS:
            tile = qkv_tile(shape.qkv // 2, shape.hidden)
            return qkv_fused(self.hidden, weight, self.qkv, *places, tile, self.traits, bias_E=self.bias)
        self.linear(self.hidden, weight, self.qkv)
        return qkv_epilogue(self.qkv, *places, self.traits, bias_E=self.bias)

    def __call__(self) -> None:
        shape, traits, num_rows = self.shape, self.traits, self.x.shape[0]
        for layer in range(shape.num_layers):
            key, value = self.pools[layer % len(self.pools)]
            add_rms_norm(self.x, self.residual, self.norm_weight[0], 1e-6, self.hidden, traits)
            q = self.project_qkv(layer, key, value)
            paged_attention(
                q,
                key,
                value,
                self.table,
                self.query_start,
                self.start,
                self.attended,
                scale=shape.head_dim**-0.5,
                max_query_tokens=1,
                traits=traits,
                num_splits=self.num_splits,
                workspace=self.workspace,
            )
            self.linear(self.attended.view(num_rows, -1), self.weights["o"][layer], self.x)
            add_rms_norm(self.x, self.residual, self.norm_weight[0], 1e-6, self.hidden, traits)
            gate_up = self.weights["gate_up"][layer]
            if takes(gate_up, None, traits) and swiglu_product_serves(num_rows, shape.intermediate, shape.hidden):
                joined = swiglu_product_tile(num_rows, shape.intermediate, traits.num_sms)
                swiglu_product(self.hidden, gate_up, self.half, joined, traits)
            elif num_rows <= swiglu_triton_tokens(shape.intermediate, shape.hidden):
                tile = swiglu_tile(shape.intermediate, shape.hidden, num_rows)
                linear_sequential(self.hidden, gate_up, self.half, tile, traits, swiglu=True)
            else:
                linear_blas(self.hidden, gate_up, self.gate_up)
                swiglu(self.gate_up, self.half, traits)
            self.linear(self.half, self.weights["down"][layer], self.x)
        add_rms_norm(self.x, self.residual, self.norm_weight[0], 1e-6, self.hidden, traits)
        self.linear(self.hidden, self.weights["head"][0], self.logits)


def model_weights(shape: Shape) -> dict[str, list[torch.Tensor]]:
    return {
        name: [random(*size, scale=0.02) for _ in range(1 if name == "head" else shape.num_layers)]
        for name, size in products(shape).items()
    }


def time_steps(shape: Shape, traits: GpuTraits, peak_tb_s: float, context: int = 256) -> Iterator[str]:
    weights = model_weights(shape)
    weight_bytes = sum(weight.nbytes for layer in weights.values() for weight in layer)
    for num_rows in (1, 16, 32, 64, 256):
        step = DecodeStep(shape, num_rows, context, traits, weights)
        with in_order(DEVICE):
            us = graph_us(step, 10)
        kv_bytes = num_rows * context * shape.num_layers * shape.num_kv_heads * shape.head_dim * 4
        floor_us = (weight_bytes + kv_bytes) / peak_tb_s / 1e6
        yield f"| {shape.name} | {num_rows} | {context} | {us / 1e3:.2f} | {floor_us / 1e3:.2f} | {floor_us / us:.0%} |"


def main() -> None:
    torch.manual_seed(0)
    traits = GpuTraits.of(DEVICE)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}")
    gate = Gate()
    gate_rows(gate, traits)
    gate_linear(gate, traits)
    gate_attention(gate, traits)
    if gate.failed:
        print(f"{len(gate.failed)} checks failed: {gate.failed}")
        if "--anyway" not in sys.argv:
            raise SystemExit(1)
    peak_tb_s = read_tb_s(traits)
    print(f"\nReading: {peak_tb_s:.2f} TB/s\n")
    print("| decode step, kernels only | rows | context | ms | floor ms | of the floor |\n|---|---|---|---|---|---|")
    for shape in (QWEN, LLAMA):
        for line in time_steps(shape, traits, peak_tb_s):
            print(line, flush=True)
    print(
        "\n| product | tokens | Triton µs | cuBLASLt in order µs | cuBLAS default µs | TB/s of the one used | of reading |"
    )
    print("|---|---|---|---|---|---|---|")
    for shape, num_tokens in itertools.product((QWEN, LLAMA), (1, 16, 32, 64, 256)):
        for line in time_linear(shape, num_tokens, peak_tb_s, traits):
            print(line, flush=True)
    print("\n| attention | programs a row | µs | TB/s | of reading |\n|---|---|---|---|---|")
    for shape in (QWEN, LLAMA):
        for rows, context in (
            (1, 128),
            (1, 1024),
            (1, 8192),
            (1, 32768),
            (16, 1024),
            (16, 4096),
            (64, 1024),
            (256, 512),
        ):
            print(time_decode_attention(shape, rows, context, peak_tb_s, traits), flush=True)
    print("\n| attention | µs | TFLOP/s | torch SDPA TFLOP/s |\n|---|---|---|---|")
    for shape, length in itertools.product((QWEN, LLAMA), (1024, 4096, 16384)):
        print(time_prefill_attention(shape, length, traits), flush=True)
    print("\n| model | tokens | add + RMSNorm µs | QKV epilogue µs | SwiGLU µs |\n|---|---|---|---|---|")
    for shape, num_tokens in itertools.product((QWEN, LLAMA), (1, 16, 64, 256, 4096)):
        for line in time_rows(shape, num_tokens, traits):
            print(line, flush=True)


if __name__ == "__main__":
    main()
