"""What a step of a prompt saves on the CPU by computing, behind the last layer's cache, wanted tokens alone.

    python benchmarks/wanted_tokens.py [--model smollm2-135m] [--lengths 128 512 1024] [--quantization a8w8] [--rounds 20]

Chunks of a prompt, from the embedding to the logits of the last token: with the hidden states of all tokens wanted, as for
prompt logprobs; of the last token, as for a sample; and of none, as in the middle of a prompt, without logits. One process, the
three in turns. Quoted is how many times as long as a step that wants all takes, the median of the rounds' ratios, with the
quartiles.
"""

import argparse
from collections.abc import Iterator
from dataclasses import replace
from statistics import median, quantiles
from time import perf_counter
from typing import get_args

import numpy as np
import torch
from native_step import CPU, Test, batch_of, pool_for
from rich.console import Console
from rich.table import Table

from triode.cache.pool import KVPool
from triode.kernels.dispatch import choose_kernels
from triode.kernels.native.library import load_library
from triode.models.batch import StepBatch
from triode.models.config import ModelOptions
from triode.models.decoder import Decoder
from triode.models.loader import open_checkpoint
from triode.models.native import NativeDecoder
from triode.models.program import StepProgram
from triode.models.quantization import Quantization, plan_weights


def step_s(decoder: StepProgram, batch: StepBatch, pool: KVPool) -> float:
    start_s = perf_counter()
    hidden_WD = decoder.forward(batch, pool.keys, pool.values)
    if len(hidden_WD):
        decoder.logits(hidden_WD[-1:])
    return perf_counter() - start_s


def ratios(decoder: StepProgram, length: int, rounds: int) -> Iterator[list[float]]:
    """Of each round, for the last token and for none: seconds over those of all."""
    test = Test("", 1, 0, length)
    pool, last = (
        pool_for(test, decoder.config, decoder.dtype),
        batch_of(test, decoder.config, decoder.kernels.row_multiple),
    )
    everything = replace(last, wanted_start_R1=last.rows.query_start_R1)
    nothing = replace(last, wanted_start_R1=np.zeros(2, np.int64))
    step_s(decoder, everything, pool)
    for _ in range(rounds):
        all_s, *others = [step_s(decoder, batch, pool) for batch in (everything, last, nothing)]
        yield [seconds / all_s for seconds in others]


def cell(found: tuple[float, ...]) -> str:
    low, _, high = quantiles(found, n=4)
    return f"{median(found):.3f} ({low:.3f} to {high:.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"], choices=["bfloat16", "float32"])
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 512, 1024])
    parser.add_argument("--quantization", default="none", choices=get_args(Quantization), help="of the compiled step")
    parser.add_argument("--rounds", type=int, default=20)
    arguments = parser.parse_args()
    library, plan = load_library(print), plan_weights(arguments.quantization, None)
    checkpoint = open_checkpoint(ModelOptions(model=arguments.model))
    table = Table("", "dtype", "tokens", "the last one", "none", title=f"{arguments.model}, {library.isa.name}, {plan}")
    with torch.inference_mode():
        for name in arguments.dtypes:
            dtype = getattr(torch, name)
            weights = checkpoint.load_weights(dtype, CPU)
            programs: dict[str, StepProgram] = {
                "compiled step": NativeDecoder(checkpoint.config, weights, library, plan=plan),
                "torch": Decoder(checkpoint.config, weights, choose_kernels(CPU, dtype)),
            }
            for program, decoder in programs.items():
                for length in arguments.lengths:
                    found = zip(*ratios(decoder, length, arguments.rounds), strict=True)
                    table.add_row(program, name, str(length), *map(cell, found))
    Console().print(table)


if __name__ == "__main__":
    main()
