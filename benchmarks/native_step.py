"""The compiled CPU step beside the torch kernels: same weights, dtype and threads, in one process, taking turns.

    python benchmarks/native_step.py [--model smollm2-135m] [--dtypes bfloat16 float32] [--quantization a16w8] [--json]

Each test is one step (embedding to logits of the rows that need them, without sampling) over a paged cache of real
shapes. The two take turns (A B A B), so that whatever else the machine does meets both; quoted are the medians and their
ratio. Read bandwidth is that of the packed weights, each read once a step.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from time import perf_counter
from typing import get_args

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from triode.cache.pool import KVPool
from triode.kernels.dispatch import choose_kernels
from triode.kernels.native.library import load_library
from triode.models.batch import StepBatch, build_batch
from triode.models.config import ModelConfig, ModelOptions
from triode.models.decoder import Decoder
from triode.models.loader import open_checkpoint
from triode.models.native import NativeDecoder
from triode.models.program import StepProgram
from triode.models.quantization import Quantization, plan_weights

BLOCK_SIZE_TOKENS = 16
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Test:
    """A step: `rows` rows of `num_query` tokens each after `start` that are in the cache."""

    name: str
    rows: int
    start: int
    num_query: int


TESTS = (
    Test("decode 1, context 128", 1, 128, 1),
    Test("decode 1, context 4096", 1, 4096, 1),
    Test("decode 4, context 128", 4, 128, 1),
    Test("decode 16, context 128", 16, 128, 1),
    Test("decode 16, context 1024", 16, 1024, 1),
    Test("prefill 128", 1, 0, 128),
    Test("prefill 1024", 1, 0, 1024),
)


@dataclass(frozen=True)
class Figure:
    """What one test gave."""

    test: str
    dtype: str
    torch_ms: float
    native_ms: float
    native_tokens_a_s: float
    ratio: float


def batch_of(test: Test, config: ModelConfig, row_multiple: int) -> StepBatch:
    blocks = -(-(test.start + test.num_query) // BLOCK_SIZE_TOKENS)
    table_RC = np.random.default_rng(0).permutation(np.arange(1, test.rows * blocks + 1)).reshape(test.rows, blocks)
    return build_batch(
        np.random.default_rng(1).integers(0, config.vocab_size, test.rows * test.num_query),
        np.full(test.rows, test.start),
        np.full(test.rows, test.num_query),
        table_RC,
        block_size_tokens=BLOCK_SIZE_TOKENS,
        row_multiple=row_multiple,
        device=CPU,
        num_wanted_R=np.ones(test.rows, np.int64),
    )


def pool_for(test: Test, config: ModelConfig, dtype: torch.dtype) -> KVPool:
    blocks = -(-(test.start + test.num_query) // BLOCK_SIZE_TOKENS)
    pool = KVPool(
        test.rows * blocks + 1,
        block_size_tokens=BLOCK_SIZE_TOKENS,
        num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        dtype=dtype,
        device=CPU,
    )
    for tensor in (*pool.keys, *pool.values):
        tensor.normal_()
    return pool


def step_s(decoder: StepProgram, batch: StepBatch, pool: KVPool) -> float:
    start_s = perf_counter()
    decoder.logits(decoder.forward(batch, pool.keys, pool.values))
    return perf_counter() - start_s


def compare(test: Test, config: ModelConfig, decoders: Sequence[StepProgram], rounds: int, budget_s: float) -> Figure:
    """Each side runs for `budget_s` a round."""
    pool = pool_for(test, config, decoders[0].dtype)
    batches = [batch_of(test, config, decoder.kernels.row_multiple) for decoder in decoders]
    times: list[list[float]] = [[], []]
    for decoder, batch in zip(decoders, batches, strict=True):
        step_s(decoder, batch, pool)
    for _ in range(rounds):
        for decoder, batch, mine in zip(decoders, batches, times, strict=True):
            end_s = perf_counter() + budget_s
            while True:
                mine.append(step_s(decoder, batch, pool))
                if perf_counter() > end_s:
                    break
    torch_s, native_s = (median(mine) for mine in times)
    num_tokens = test.rows * test.num_query
    dtype = str(decoders[0].dtype).removeprefix("torch.")
    return Figure(test.name, dtype, torch_s * 1e3, native_s * 1e3, num_tokens / native_s, torch_s / native_s)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"], choices=["bfloat16", "float32"])
    parser.add_argument("--quantization", default="none", choices=get_args(Quantization), help="of the compiled step")
    parser.add_argument("--group", type=int, help="inputs that share a scale")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--budget-s", type=float, default=0.5)
    parser.add_argument("--only", default="", help="tests whose name contains this")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    library = load_library(print)
    plan = plan_weights(arguments.quantization, arguments.group)
    checkpoint = open_checkpoint(ModelOptions(model=arguments.model))
    figures = []
    with torch.inference_mode():
        for name in arguments.dtypes:
            dtype = getattr(torch, name)
            weights = checkpoint.load_weights(dtype, CPU)
            reference = Decoder(checkpoint.config, weights, choose_kernels(CPU, dtype))
            decoders = (reference, NativeDecoder(checkpoint.config, weights, library, plan=plan))
            tests = [test for test in TESTS if arguments.only in test.name]
            figures += [
                compare(test, checkpoint.config, decoders, arguments.rounds, arguments.budget_s) for test in tests
            ]
    if arguments.json:
        print(json.dumps([asdict(figure) for figure in figures]))
        return
    table = Table(title=f"{arguments.model}, {torch.get_num_threads()} threads, {library.isa.name}, {plan}")
    for column in ("test", "dtype", "torch ms", "native ms", "native tok/s", "torch / native"):
        table.add_column(column, justify="left" if column in ("test", "dtype") else "right")
    for figure in figures:
        table.add_row(
            figure.test,
            figure.dtype,
            f"{figure.torch_ms:.2f}",
            f"{figure.native_ms:.2f}",
            f"{figure.native_tokens_a_s:.0f}",
            f"{figure.ratio:.2f}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
