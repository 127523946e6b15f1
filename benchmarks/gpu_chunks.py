"""Attention of a short chunk behind a long context: how long it takes when programs share the context and when not.

    PYTHONPATH=src python benchmarks/gpu_chunks.py [--models qwen llama small] [--tokens 24 40] [--contexts 1000]

Where `kernels/paged_attention/tiles.py` has its numbers from, on Hopper. Each number is checked to come with the bits of
programs that share nothing. Times are of CUDA graph replays over the layers of a model, whose KV pools rotate.

T query tokens    N query heads    K KV heads    H head dim    P blocks    B block size    C blocks in a table
"""

import argparse
import functools
import math
from collections.abc import Iterator, Sequence

import torch
from gpu_timing import BLOCK, DEVICE, LLAMA, QWEN, Shape, graph_us, int32, random, unwritten

from triode.kernels.gpu_traits import GpuTraits
from triode.kernels.paged_attention.gpu import AttentionWorkspace, paged_attention
from triode.kernels.paged_attention.tiles import HOPPER_PAIRS, SEGMENT_TOKENS, splits_of_long_rows

SMALL_QWEN = Shape("Qwen2.5-0.5B", 896, 14, 2, 64, 4864, 151936, 24)
SHAPES = {"qwen": QWEN, "llama": LLAMA, "small": SMALL_QWEN}
CHUNKS = (24, 40, 128, 256)
CONTEXTS = (500, 1000, 2000, 3960, 8000)
MAX_SEGMENTS = 17
NUM_POOLS = 24


class Chunk:
    """A chunk's queries and the KV of some layers."""

    def __init__(self, shape: Shape, num_tokens: int, context: int, traits: GpuTraits) -> None:
        self.shape, self.traits = shape, traits
        self.num_segments = math.ceil((context + num_tokens) / SEGMENT_TOKENS)
        query_tokens = HOPPER_PAIRS // (shape.num_heads // shape.num_kv_heads)
        self.num_programs = (num_tokens // query_tokens + 1) * shape.num_kv_heads
        num_blocks = math.ceil((context + num_tokens) / BLOCK)
        pool = (num_blocks + 1, BLOCK, shape.num_kv_heads, shape.head_dim)
        self.pools = [(random(*pool), random(*pool)) for _ in range(NUM_POOLS)]
        self.q_TNH = random(num_tokens, shape.num_heads, shape.head_dim)
        self.out_TNH = torch.empty_like(self.q_TNH)
        self.rows = (
            (torch.randperm(num_blocks, device=DEVICE) + 1).int()[None],
            int32([0, num_tokens]),
            int32([context]),
        )
        self.workspace = AttentionWorkspace.allocate(
            self.num_programs, MAX_SEGMENTS, HOPPER_PAIRS, shape.head_dim, DEVICE
        )

    def attend(self, num_splits: int, num_pools: int = NUM_POOLS) -> None:
        """Over some layers."""
        for key_PBKH, value_PBKH in self.pools[:num_pools]:
            paged_attention(
                self.q_TNH,
                key_PBKH,
                value_PBKH,
                *self.rows,
                self.out_TNH,
                scale=self.shape.head_dim**-0.5,
                max_query_tokens=len(self.q_TNH),
                traits=self.traits,
                num_splits=num_splits,
                workspace=self.workspace,
            )

    def us(self, num_splits: int) -> float:
        """A layer's."""
        return graph_us(functools.partial(self.attend, num_splits)) / NUM_POOLS

    def bits(self, num_splits: int) -> torch.Tensor:
        """Of the first layer."""
        self.out_TNH.copy_(unwritten(*self.out_TNH.shape))
        self.attend(num_splits, 1)
        return self.out_TNH.clone()


def lines(shape: Shape, chunks: Sequence[int], contexts: Sequence[int], traits: GpuTraits) -> Iterator[str]:
    for num_tokens in chunks:
        for context in contexts:
            chunk = Chunk(shape, num_tokens, context, traits)
            sizes = [size for size in (2, 3, 4, 8, 16) if size <= chunk.num_segments]
            if any(not torch.equal(chunk.bits(size), chunk.bits(1)) for size in sizes):
                raise SystemExit(f"{shape.name}: {num_tokens} tokens after {context} have other bits when shared")
            chosen = splits_of_long_rows(chunk.num_programs, chunk.num_segments, MAX_SEGMENTS, traits)
            shared = " ".join(f"{size}: {chunk.us(size):.1f}" for size in sizes)
            times = f"{chunk.us(1):.1f} | {shared} | {chosen} | {chunk.us(chosen):.1f}"
            yield f"| {shape.name} | {num_tokens} after {context} | {chunk.num_programs} | {times} |"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--tokens", type=int, nargs="+", default=CHUNKS)
    parser.add_argument("--contexts", type=int, nargs="+", default=CONTEXTS)
    args = parser.parse_args()
    torch.manual_seed(0)
    traits = GpuTraits.of(DEVICE)
    print("| model | tokens | query tiles × KV heads | unshared µs | shared among | chosen | µs |")
    print("|---|---|---|---|---|---|---|")
    for model in args.models:
        for line in lines(SHAPES[model], args.tokens, args.contexts, traits):
            print(line, flush=True)


if __name__ == "__main__":
    main()
