"""The GPU kernels on the GPU at hand: right, the same bits for every batch, and how fast. One run prints every table.

    PYTHONPATH=src python benchmarks/gpu_kernels.py

Timing comes behind the gates: a kernel that is wrong has no speed (`--anyway` times it nevertheless). Times are medians
of CUDA graph replays; weights and KV pools rotate, so that they come from memory and not from L2.

T tokens    N query heads    K KV heads    H head dim    P blocks    B block size    C blocks in a table
"""

import dataclasses
import itertools
import math
import statistics
import sys
from collections.abc import Callable, Iterator

import torch
import triton

from triode.kernels.gpu_traits import GpuTraits
from triode.kernels.linear.blas import linear_blas, split_k_refused
from triode.kernels.linear.gpu import linear_sequential
from triode.kernels.linear.proof import prove
from triode.kernels.linear.tiles import LinearTile, linear_tile, swiglu_tile, swiglu_triton_tokens, triton_tokens
from triode.kernels.paged_attention.gpu import AttentionWorkspace, paged_attention
from triode.kernels.paged_attention.tiles import SEGMENT_TOKENS, AttentionTile, decode_tile, splits_for
from triode.kernels.qkv_epilogue.gpu import qkv_epilogue
from triode.kernels.rms_norm.gpu import add_rms_norm
from triode.kernels.swiglu.gpu import swiglu

DEVICE = torch.device("cuda")
BLOCK = 16


@dataclasses.dataclass(frozen=True)
class Shape:
    """A model's sizes."""

    name: str
    hidden: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    num_layers: int

    @property
    def qkv(self) -> int:
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim


QWEN = Shape("Qwen2.5-7B", 3584, 28, 4, 128, 18944, 152064, 28)
LLAMA = Shape("Llama-3.1-8B", 4096, 32, 8, 128, 14336, 128256, 32)


def random(*size: int, scale: float = 1.0, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return (torch.empty(*size, dtype=torch.bfloat16, device=DEVICE).normal_() * scale).to(dtype)


def unwritten(*size: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """NaN everywhere: what a kernel leaves unwritten shows."""
    return torch.full(size, math.nan, dtype=dtype, device=DEVICE)


def int32(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def graph_us(step: Callable[[], object], num_replays: int = 12) -> float:
    """Median time of a CUDA graph replay of `step`, in microseconds."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    times: list[float] = []
    for _ in range(num_replays):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3)
    return statistics.median(times[2:])


def read_tb_s(traits: GpuTraits) -> float:
    """What reading reaches here: the sequential product over weights of 1 GB each, the best reader at hand."""
    weights = [random(131072, 4096, scale=0.02) for _ in range(4)]
    x, out = random(1, 4096), unwritten(1, 131072)
    tile = LinearTile(32, 16, 256, 4, 8)

    def read() -> None:
        for weight in weights:
            linear_sequential(x, weight, out, tile, traits)

    us = graph_us(read)
    return 4 * weights[0].nbytes / us / 1e6


class Gate:
    """Collects checks, prints each, remembers failures."""

    def __init__(self) -> None:
        self.failed: list[str] = []

    def check(self, name: str, ok: bool, detail: str = "") -> None:
        print(f"  {'ok  ' if ok else 'FAIL'} {name} {detail}", flush=True)
        if not ok:
            self.failed.append(name)

    def close(self, name: str, got: torch.Tensor, want: torch.Tensor, limit: float) -> None:
        error = ((got.double() - want.double()).norm() / want.double().norm()).item()
        self.check(name, error < limit, f"relative error {error:.1e}")


@dataclasses.dataclass(frozen=True)
class AttentionCase:
    """One sequence in a shuffled pool, and a query at every position of it."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype = torch.bfloat16
    kv_dtype: torch.dtype | None = None
    window: int = 0
    sharpness: float = 1.0
    """Scores spread this much wider than a standard normal: sums of weights are then rounded, and their order shows."""
    length: int = 3000

    def build(self, traits: GpuTraits) -> "AttentionRun":
        num_blocks = math.ceil(self.length / BLOCK)
        pool = (num_blocks + 1, BLOCK, self.num_kv_heads, self.head_dim)
        return AttentionRun(
            self,
            traits,
            random(self.length, self.num_heads, self.head_dim, scale=self.sharpness, dtype=self.dtype),
            random(*pool, dtype=self.kv_dtype or self.dtype),
            random(*pool, dtype=self.kv_dtype or self.dtype),
            (torch.randperm(num_blocks, device=DEVICE) + 1).int(),
        )


@dataclasses.dataclass(frozen=True)
class AttentionRun:
    """The case's tensors, and the ways to compute it."""

    case: AttentionCase
    traits: GpuTraits
    q_TNH: torch.Tensor
    key_PBKH: torch.Tensor
    value_PBKH: torch.Tensor
    table_C: torch.Tensor

    def prefill(self, *chunks: int, tile: AttentionTile | None = None, num_splits: int = 1) -> torch.Tensor:
        out = torch.full_like(self.q_TNH, math.nan)
        for first, last in itertools.pairwise(itertools.accumulate(chunks, initial=0)):
            starts, rows = int32([first]), int32([0, last - first])
            self._attend(self.q_TNH[first:last], rows, starts, out[first:last], last - first, num_splits, tile)
        return out

    def decode(self, positions: list[int], num_splits: int, tile: AttentionTile | None = None) -> torch.Tensor:
        q = self.q_TNH[positions]
        out = torch.full_like(q, math.nan)
        self._attend(
            q, torch.arange(len(positions) + 1, device=DEVICE).int(), int32(positions), out, 1, num_splits, tile
        )
        return out

    def _attend(
        self,
        q_TNH: torch.Tensor,
        query_start: torch.Tensor,
        start: torch.Tensor,
        out: torch.Tensor,
        most: int,
        num_splits: int,
        tile: AttentionTile | None,
    ) -> None:
        case = self.case
        workspace = None
        if num_splits > 1:
            group = case.num_heads // case.num_kv_heads
            pairs = (tile or decode_tile(group, case.head_dim, self.key_PBKH.dtype, self.traits)).pairs
            programs = (len(q_TNH) + len(start)) * case.num_kv_heads
            segments = math.ceil(case.length / SEGMENT_TOKENS)
            workspace = AttentionWorkspace.allocate(programs, segments, pairs, case.head_dim, DEVICE)
        paged_attention(
            q_TNH,
            self.key_PBKH,
            self.value_PBKH,
            self.table_C.expand(len(start), -1),
            query_start,
            start,
            out,
            scale=case.head_dim**-0.5,
            max_query_tokens=most,
            traits=self.traits,
            window_tokens=case.window,
            num_splits=num_splits,
            workspace=workspace,
            tile=tile,
        )
        if workspace is not None and workspace.arrivals_W.any():
            raise AssertionError("a launch left its arrivals behind")

    def reference(self) -> torch.Tensor:
        case = self.case
        key, value = (
            pool[self.table_C.long()].flatten(0, 1)[: case.length].float() for pool in (self.key_PBKH, self.value_PBKH)
        )
        position = torch.arange(case.length, device=DEVICE)
        seen = position[None, :] <= position[:, None]
        if case.window:
            seen &= position[None, :] > position[:, None] - case.window
        group = case.num_heads // case.num_kv_heads
        heads = []
        for head in range(case.num_heads):
            scores = self.q_TNH[:, head].float() @ key[:, head // group].T * case.head_dim**-0.5
            heads.append(scores.masked_fill(~seen, -torch.inf).softmax(-1) @ value[:, head // group])
        return torch.stack(heads, 1)


ATTENTION_CASES = {
    "7:1, 128": AttentionCase(28, 4, 128),
    "4:1, 128": AttentionCase(32, 8, 128),
    "3:1, 64": AttentionCase(9, 3, 64),
    "1:1, 80, float16": AttentionCase(4, 4, 80, torch.float16),
    "2:1, 96": AttentionCase(8, 4, 96),
    "2:1, 256": AttentionCase(8, 4, 256),
    "16:1, 128": AttentionCase(32, 2, 128),
    "7:1, 128, window 1000": AttentionCase(28, 4, 128, window=1000),
    "4:1, 128, fp8 KV": AttentionCase(32, 8, 128, kv_dtype=torch.float8_e4m3fn),
    "7:1, 128, sharp": AttentionCase(28, 4, 128, sharpness=8),
    "3:1, 64, float16, sharp": AttentionCase(9, 3, 64, torch.float16, sharpness=4),
    "2:1, 256, sharp": AttentionCase(8, 4, 256, sharpness=8),
    "4:1, 128, fp8 KV, sharp": AttentionCase(32, 8, 128, kv_dtype=torch.float8_e4m3fn, sharpness=8),
}


def gate_attention(gate: Gate, traits: GpuTraits) -> None:
    positions = [*range(1, 40), *range(500, 530), *range(1000, 3000, 97)]
    for name, case in ATTENTION_CASES.items():
        run = case.build(traits)
        whole = run.prefill(3000)
        gate.close(f"attention {name}", whole, run.reference(), 6e-3)
        for chunks in ((512, 512, 1000, 976), (37, 1000, 1963), (2990, 1, 1, 8)):
            gate.check(f"attention {name}: chunks {chunks}", torch.equal(run.prefill(*chunks), whole))
        for num_splits in (1, 3, 6):
            same = torch.equal(run.decode(positions, num_splits), whole[positions])
            gate.check(f"attention {name}: {len(positions)} decode rows, {num_splits} programs a row", same)
        alone = torch.cat([run.decode([position], 6) for position in positions[::7]])
        gate.check(f"attention {name}: decode rows alone", torch.equal(alone, whole[positions[::7]]))
    run = ATTENTION_CASES["7:1, 128, sharp"].build(traits)
    whole = run.prefill(3000)
    for tile in (AttentionTile(16, 1, 2), AttentionTile(64, 4, 2), AttentionTile(128, 4, 3), AttentionTile(128, 8, 2)):
        gate.check(f"attention tile {tile}", torch.equal(run.prefill(3000, tile=tile), whole))
    split = run.prefill(2000, 1000, tile=AttentionTile(64, 4, 2), num_splits=4)
    gate.check("attention: prefill split over KV", torch.equal(split, whole))


def gate_linear(gate: Gate, traits: GpuTraits) -> None:
    for shape in (QWEN, LLAMA):
        for name, (out_features, in_features) in products(shape).items():
            weight = random(out_features, in_features, scale=0.02)
            x, out = random(40, in_features), unwritten(40, out_features)
            linear_sequential(x, weight, out, linear_tile(out_features, in_features, 40), traits)
            gate.close(f"{shape.name} {name}", out, x.float() @ weight.float().T, 3e-3)
            print("      ", prove(weight, traits, most_tokens=2048))
    allowed = prove(random(1024, 16384, scale=0.02), traits, refuse_split_k=False)
    gate.check("the proof fails when split-K is allowed", bool(allowed.differing_tokens), str(allowed))
    few, many = random(32, 3584), unwritten(256, 2 * 18944)
    weight = random(2 * 18944, 3584, scale=0.02)
    separate, fused = unwritten(256, 18944), unwritten(32, 18944)
    linear_sequential(few, weight, fused, swiglu_tile(18944, 3584, 32), traits, swiglu=True)
    with split_k_refused():
        linear_blas(torch.cat([few, random(224, 3584)]), weight, many)
    swiglu(many, separate, traits)
    gate.check("gate-up: fused SwiGLU equals cuBLASLt and SwiGLU", torch.equal(fused, separate[:32]))
    gate_want, up_want = (few.float() @ weight.float().T).chunk(2, -1)
    gate.close("gate-up with SwiGLU", fused, torch.nn.functional.silu(gate_want) * up_want, 6e-3)


def gate_rows(gate: Gate, traits: GpuTraits) -> None:
    x, residual, weight = random(300, 3584), random(300, 3584), random(3584)
    total, out = residual.clone(), unwritten(300, 3584)
    add_rms_norm(x, total, weight, 1e-6, out, traits)
    want = torch.nn.functional.rms_norm(x.double() + residual.double(), (3584,), weight.double(), 1e-6)
    gate.close("add + RMSNorm", out, want, 6e-3)
    one, one_out = residual[7:8].clone(), unwritten(1, 3584)
    add_rms_norm(x[7:8], one, weight, 1e-6, one_out, traits)
    gate.check("add + RMSNorm: a row alone", torch.equal(one_out, out[7:8]) and torch.equal(one, total[7:8]))
    for norm in (False, True):
        run = EpilogueRun(QWEN, 300, norm, traits)
        q_all, key_all, value_all = run(slice(0, 300))
        q_one, key_one, value_one = run(slice(7, 8))
        same = torch.equal(q_one, q_all[7:8]) and torch.equal(key_one, key_all[7:8])
        gate.check(f"QKV epilogue, norm {norm}: a row alone", same and torch.equal(value_one, value_all[7:8]))
        q_want, key_want, value_want = run.reference()
        gate.close(f"QKV epilogue, norm {norm}: queries", q_all, q_want, 6e-3)
        gate.close(f"QKV epilogue, norm {norm}: keys", key_all, key_want, 6e-3)
        gate.close(f"QKV epilogue, norm {norm}: values", value_all, value_want, 6e-3)


class EpilogueRun:
    """Random QKV rows, and the epilogue over some of them."""

    def __init__(self, shape: Shape, num_tokens: int, norm: bool, traits: GpuTraits) -> None:
        self.shape, self.norm, self.traits = shape, norm, traits
        half = shape.head_dim // 2
        self.qkv, self.bias = random(num_tokens, shape.qkv), random(shape.qkv)
        self.norms = (random(shape.head_dim), random(shape.head_dim))
        angle = torch.rand(4096, half, device=DEVICE) * 6
        self.cos, self.sin = angle.cos(), angle.sin()
        self.position = torch.randint(0, 4096, (num_tokens,), device=DEVICE)
        self.slot = torch.randperm(num_tokens, device=DEVICE) + BLOCK

    def __call__(self, rows: slice) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        shape = self.shape
        pool = (len(self.slot) // BLOCK + 2, BLOCK, shape.num_kv_heads, shape.head_dim)
        key, value = unwritten(*pool), unwritten(*pool)
        q = qkv_epilogue(
            self.qkv[rows].clone(),
            self.cos,
            self.sin,
            self.position[rows],
            self.slot[rows],
            key,
            value,
            shape.num_heads,
            self.traits,
            bias_E=self.bias,
            q_norm_H=self.norms[0] if self.norm else None,
            k_norm_H=self.norms[1] if self.norm else None,
            eps=1e-6,
        )
        return q, key.flatten(0, 1)[self.slot[rows]], value.flatten(0, 1)[self.slot[rows]]

    def reference(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        shape = self.shape
        heads = (self.qkv.double() + self.bias.double()).unflatten(1, (-1, shape.head_dim))
        q, k, v = heads.split([shape.num_heads, shape.num_kv_heads, shape.num_kv_heads], 1)
        if self.norm:
            q, k = (
                torch.nn.functional.rms_norm(x, (shape.head_dim,), weight.double(), 1e-6)
                for x, weight in zip((q, k), self.norms, strict=True)
            )
        return self._rotate(q), self._rotate(k), v

    def _rotate(self, x_TNH: torch.Tensor) -> torch.Tensor:
        cos, sin = self.cos[self.position][:, None].double(), self.sin[self.position][:, None].double()
        first, second = x_TNH.chunk(2, -1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def products(shape: Shape) -> dict[str, tuple[int, int]]:
    """Plain products as (out features, in features)."""
    return {
        "qkv": (shape.qkv, shape.hidden),
        "o": (shape.hidden, shape.num_heads * shape.head_dim),
        "gate_up": (2 * shape.intermediate, shape.hidden),
        "down": (shape.hidden, shape.intermediate),
        "head": (shape.vocab, shape.hidden),
    }


def copies_of(out_features: int, in_features: int) -> list[torch.Tensor]:
    """Enough weights that L2 does not hold them."""
    return [
        random(out_features, in_features, scale=0.02)
        for _ in range(max(2, int(6e8 // (out_features * in_features * 2))))
    ]


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
        ) -> None:
            for weight in weights:
                linear_blas(x, weight, out)
                if fused:
                    swiglu(out, half, traits)

        with split_k_refused():
            in_order = graph_us(blas) / len(weights)
        default = graph_us(blas) / len(weights)
        ours = graph_us(sequential) / len(weights)
        most = (
            swiglu_triton_tokens(out_features // 2, in_features) if fused else triton_tokens(out_features, in_features)
        )
        used = ours if num_tokens <= most else in_order
        tb_s = weights[0].nbytes / used / 1e6
        yield (
            f"| {shape.name} {name}{' + SwiGLU' if fused else ''} | {num_tokens} | {ours:.1f} | {in_order:.1f} | "
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

    def __call__(self) -> None:
        shape, traits, num_rows = self.shape, self.traits, self.x.shape[0]
        for layer in range(shape.num_layers):
            key, value = self.pools[layer % len(self.pools)]
            add_rms_norm(self.x, self.residual, self.norm_weight[0], 1e-6, self.hidden, traits)
            self.linear(self.hidden, self.weights["qkv"][layer], self.qkv)
            q = qkv_epilogue(
                self.qkv,
                self.cos,
                self.sin,
                self.start,
                self.slot,
                key,
                value,
                shape.num_heads,
                traits,
                bias_E=self.bias,
            )
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
            if num_rows <= swiglu_triton_tokens(shape.intermediate, shape.hidden):
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
        with split_k_refused():
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
