"""How fast each format of weights is in the compiled CPU step: tokens for a second of one thread's processor time.

    python benchmarks/formats.py [--model smollm2-135m] [--rounds 15] [--only "batch 1"]

On a busy machine the time of the clock says little, and the processor's more: one step of each format after the other,
again and again, in one process with one thread, and of each format's times the lower quartile. Steps are those of
`NativeDecoder` alone, without engine and sampler.
"""

import argparse
from statistics import quantiles
from time import process_time

import torch
from native_step import CPU, Test, batch_of, pool_for, step_s
from rich.console import Console
from rich.table import Table

from triode.kernels.native.library import load_library
from triode.models.config import ModelOptions
from triode.models.loader import open_checkpoint
from triode.models.native import NativeDecoder
from triode.models.quantization import Quantization, plan_weights

FORMATS: dict[str, tuple[Quantization, int | None]] = {
    "bfloat16": ("none", None),
    "a16w8": ("a16w8", None),
    "a8w8": ("a8w8", None),
    "a8w8 g32": ("a8w8", 32),
    "a8w8 per channel": ("a8w8", 0),
    "a16w4": ("a16w4", None),
    "a8w4": ("a8w4", None),
    "a8gguf": ("a8gguf", None),
}
TESTS = (
    Test("batch 1", 1, 128, 1),
    Test("batch 4", 4, 128, 1),
    Test("batch 16", 16, 128, 1),
    Test("prefill 128", 1, 0, 128),
)


def decoders_of(model: str) -> dict[str, NativeDecoder]:
    """The model in every format, in bfloat16 else."""
    library, checkpoint = load_library(print), open_checkpoint(ModelOptions(model=model))
    decoders = {}
    for name, (quantization, group) in FORMATS.items():
        plan = plan_weights(quantization, group)
        weights = checkpoint.load_weights(torch.bfloat16, CPU, plan=plan)
        decoders[name] = NativeDecoder(checkpoint.config, weights, library, plan=plan)
    return decoders


def tokens_a_s(test: Test, decoders: dict[str, NativeDecoder], rounds: int) -> list[float]:
    """Of each decoder."""
    first = next(iter(decoders.values()))
    pool, batch = pool_for(test, first.config, first.dtype), batch_of(test, first.config, first.kernels.row_multiple)
    times: dict[str, list[float]] = {name: [] for name in decoders}
    for turn in range(rounds + 1):
        for name, decoder in decoders.items():
            start_s = process_time()
            step_s(decoder, batch, pool)
            if turn:
                times[name].append(process_time() - start_s)
    return [test.rows * test.num_query / quantiles(mine, n=4)[0] for mine in times.values()]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rounds", type=int, default=15, help="steps of each format")
    parser.add_argument("--only", default="", help="tests whose name contains this")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with torch.inference_mode():
        decoders = decoders_of(arguments.model)
        table = Table("", *decoders, title=f"{arguments.model}, tokens for a second of one thread's processor time")
        for test in TESTS:
            if arguments.only in test.name:
                table.add_row(test.name, *(f"{speed:,.0f}" for speed in tokens_a_s(test, decoders, arguments.rounds)))
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
