"""What GPU kernels must pass before anyone times them: a higher precision, and their own bits however they are batched.

T tokens    N query heads    K KV heads    H head dim    P blocks    B block size    C blocks in a table
"""

import dataclasses
import itertools
import math

import torch
from gpu_timing import BLOCK, DEVICE, LLAMA, QWEN, Shape, int32, products, random, unwritten

from triode.kernels.gpu_traits import GpuTraits
from triode.kernels.linear.blas import in_order, linear_blas, linear_torch
from triode.kernels.linear.gpu import linear_sequential
from triode.kernels.linear.proof import prove
from triode.kernels.linear.tiles import linear_tile, qkv_tile, swiglu_tile
from triode.kernels.paged_attention.gpu import AttentionWorkspace, paged_attention
from triode.kernels.paged_attention.tiles import HOPPER_PAIRS, SEGMENT_TOKENS, AttentionTile, decode_tile
from triode.kernels.qkv_epilogue.fused import qkv_fused
from triode.kernels.qkv_epilogue.gpu import qkv_epilogue
from triode.kernels.rms_norm.gpu import add_rms_norm
from triode.kernels.swiglu.gpu import swiglu


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
            small = decode_tile(group, case.head_dim, self.key_PBKH.dtype, self.traits)
            pairs = tile.pairs if tile else HOPPER_PAIRS if most > 1 else small.pairs
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
    for num_splits in (2, 4, 8):
        split = run.prefill(2000, 40, 960, num_splits=num_splits)
        gate.check(f"attention: prefill split over KV, {num_splits} programs a row", torch.equal(split, whole))


def gate_linear(gate: Gate, traits: GpuTraits) -> None:
    for shape in (QWEN, LLAMA):
        for name, (out_features, in_features) in products(shape).items():
            weight = random(out_features, in_features, scale=0.02)
            x, out = random(40, in_features), unwritten(40, out_features)
            linear_sequential(x, weight, out, linear_tile(out_features, in_features, 40), traits)
            gate.close(f"{shape.name} {name}", out, x.float() @ weight.float().T, 3e-3)
            print("      ", prove(weight, traits, most_tokens=2048))
    allowed = prove(random(1024, 16384, scale=0.02), traits, product=linear_torch)
    gate.check("the proof fails when split-K is allowed", bool(allowed.differing_tokens), str(allowed))
    few, many = random(32, 3584), unwritten(256, 2 * 18944)
    weight = random(2 * 18944, 3584, scale=0.02)
    separate, fused = unwritten(256, 18944), unwritten(32, 18944)
    linear_sequential(few, weight, fused, swiglu_tile(18944, 3584, 32), traits, swiglu=True)
    with in_order(weight.device):
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
    for shape in (QWEN, LLAMA):
        gate_fused_projection(gate, shape, traits)


def gate_fused_projection(gate: Gate, shape: Shape, traits: GpuTraits) -> None:
    """Of 1 and of 8 tokens, bit for bit what the product and the epilogue give."""
    weight = random(shape.qkv, shape.hidden, scale=0.02)
    for num_tokens in (1, 8):
        run, x = EpilogueRun(shape, num_tokens, False, traits), random(num_tokens, shape.hidden)
        tile = linear_tile(shape.qkv, shape.hidden, num_tokens)
        linear_sequential(x, weight, run.qkv, tile, traits)
        outs = zip(run(slice(0, num_tokens)), run.fused(x, weight), strict=True)
        same = all(torch.equal(got, want) for got, want in outs)
        gate.check(f"{shape.name} fused projection of {num_tokens}: the two kernels' bits", same)


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

    def fused(self, x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        shape = self.shape
        pool = (len(self.slot) // BLOCK + 2, BLOCK, shape.num_kv_heads, shape.head_dim)
        key, value = unwritten(*pool), unwritten(*pool)
        q = qkv_fused(
            x,
            weight,
            unwritten(len(x), shape.qkv),
            self.cos,
            self.sin,
            self.position,
            self.slot,
            key,
            value,
            shape.num_heads,
            qkv_tile(shape.qkv // 2, shape.hidden),
            self.traits,
            bias_E=self.bias,
        )
        return q, key.flatten(0, 1)[self.slot], value.flatten(0, 1)[self.slot]

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
