"""What the benchmarks of GPU kernels share: shapes, random tensors, the time of a CUDA graph's replay."""

import dataclasses
import math
import statistics
from collections.abc import Callable

import torch

from triode.kernels.gpu_traits import GpuTraits
from triode.kernels.linear.gpu import linear_sequential
from triode.kernels.linear.tiles import LinearTile

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
