"""What a step saves when of most tokens the last layer computes keys and values alone (`CudaDecoder.gains_by_picking`).

    PYTHONPATH=src:tests/support python benchmarks/gpu_last_layer.py [MODEL [STEP ...]]

Each kind of step runs with and without that in turns, over one decoder; its forward's device time is by its own events.
Logits and the last layer's keys and values are checked to be there and to have the same bits: each of the two finds the
pool as the other one found it, and no logits. MODEL is one of the random models, STEP the name of a row of the table, such
as "512 tokens"; without one all are timed.
"""

import sys
from collections.abc import Sequence
from statistics import median
from typing import NamedTuple

import msgspec
import torch

from runner_world import RunnerWorld
from triode.cache.pool import KVPool
from triode.ids import BlockId
from triode.kernels.linear.blas import in_order
from triode.models.cuda.decoder import CudaDecoder
from triode.models.cuda.gpu import CudaGpu
from triode.models.cuda.rehearsal import compile_ahead
from triode.models.cuda.runner import CudaRunner
from triode.models.progress import NullProgress
from triode.models.random_model import RandomTensors, random_config
from triode.models.step import Output
from triode.models.tensors import load_weights

DEVICE = torch.device("cuda")
DTYPE = torch.bfloat16
BLOCK = 16
NUM_BLOCKS = 1800
MAX_TOKENS, MAX_ROWS = 4096, 256
MAX_CONTEXT = 8192
ROUNDS = 8


class Row(NamedTuple):
    """A row of a step."""

    cached: int
    tokens: int
    samples: bool = True


STEPS: dict[str, Sequence[Row]] = {
    **{f"{num} tokens": [Row(0, num)] for num in (4096, 4000, 2048, 1024, 512, 256, 128)},
    "1,000 tokens after 3,000": [Row(3000, 1000)],
    "128 tokens after 3,872": [Row(3872, 128)],
    "4,096 tokens, nobody samples": [Row(0, 4096, samples=False)],
    "512 tokens after 1,000, nobody samples": [Row(1000, 512, samples=False)],
    "32 prompts of 128": [Row(0, 128)] * 32,
    "64 rows of 4 after 200": [Row(200, 4)] * 64,
    "64 decoding rows beside 960": [*[Row(200, 1)] * 64, Row(0, 960, samples=False)],
    "250 decoding rows beside 3,800": [*[Row(60, 1)] * 250, Row(0, 3800)],
}


class World(RunnerWorld):
    """A runner that picks or does not, over a decoder and a pool that are another one's, too."""

    def __init__(self, decoder: CudaDecoder, pool: KVPool, gpu: CudaGpu, *, picks: bool) -> None:
        self.pool, self._decoder, self._gpu, self._picks = pool, decoder, gpu, picks
        self.runner = CudaRunner(decoder, pool, gpu, max_running=MAX_ROWS)
        self._start(NUM_BLOCKS, 0)

    def forward_ms(self, rows: Sequence[Row]) -> float:
        """Of sequences whose cached tokens have whatever keys and values lie there."""
        if not self._picks:
            self._decoder.gains_by_picking = lambda *_: False  # type: ignore[method-assign]
        self.free = [BlockId(block) for block in range(1, NUM_BLOCKS)]
        step = []
        for slot, row in enumerate(rows):
            # A row that does not sample is a chunk of a longer prompt.
            length = row.cached + row.tokens + (not row.samples)
            running = self.admit(slot, [(slot * 7919 + index * 104_729) % 499 for index in range(length)])
            running.num_computed = row.cached
            step.append((running, row.tokens, Output.SAMPLE if row.samples else Output.NONE))
        result = self.step(*step)
        vars(self._decoder).pop("gains_by_picking", None)
        return result.forward_s * 1e3

    def bits(self, rows: Sequence[Row]) -> list[torch.Tensor]:
        """Logits, and the last layer's keys and values but for those of padding. The pool stays as it was."""
        pool, logits_RV = (*self.pool.keys, *self.pool.values), self._decoder.buffers.logits_RV
        num_sampled = sum(row.samples for row in rows)
        with self._gpu.active():
            before = [tensor.clone() for tensor in pool]
            # What is not written differs, also from itself.
            logits_RV.fill_(torch.nan)
            self.forward_ms(rows)
            bits = [
                tensor.clone() for tensor in (logits_RV[:num_sampled], self.pool.keys[-1][1:], self.pool.values[-1][1:])
            ]
            for tensor, was in zip(pool, before, strict=True):
                tensor.copy_(was)
        self._gpu.wait()
        return bits


def compare(name: str, rows: Sequence[Row], whole: World, picking: World) -> None:
    agree = all(map(torch.equal, whole.bits(rows), picking.bits(rows)))
    for world in (whole, picking):
        # The second time captures.
        world.forward_ms(rows)
    pairs = [(whole.forward_ms(rows), picking.forward_ms(rows)) for _ in range(ROUNDS)]
    whole_ms, picking_ms = (median(times) for times in zip(*pairs, strict=True))
    saved_us = median(before - after for before, after in pairs) * 1e3
    print(
        f"| {name} | {whole_ms:.2f} | {picking_ms:.2f} | {saved_us:.0f} | {'same' if agree else 'DIFFERENT'} |",
        flush=True,
    )


def main() -> None:
    model = sys.argv[1] if len(sys.argv) > 1 else "qwen2.5-7b"
    config = msgspec.structs.replace(random_config(model), max_context_tokens=MAX_CONTEXT)
    gpu = CudaGpu(DEVICE)
    with in_order(DEVICE):
        weights = load_weights(config, RandomTensors(config, 0), DTYPE, DEVICE, NullProgress())
        compile_ahead(
            config,
            DTYPE,
            gpu.traits,
            block_size_tokens=BLOCK,
            max_running=MAX_ROWS,
            max_step_tokens=MAX_TOKENS,
            max_tokens=MAX_TOKENS,
            max_rows=MAX_ROWS,
        )
        with gpu.active():
            decoder = CudaDecoder(config, weights, gpu.traits, max_tokens=MAX_TOKENS, max_rows=MAX_ROWS)
            pool = KVPool(
                NUM_BLOCKS,
                block_size_tokens=BLOCK,
                num_layers=config.num_layers,
                num_kv_heads=config.num_kv_heads,
                head_dim=config.head_dim,
                dtype=DTYPE,
                device=DEVICE,
            )
            for tensor in (*pool.keys, *pool.values):
                tensor.normal_()
        torch.cuda.synchronize()
        whole, picking = (World(decoder, pool, gpu, picks=picks) for picks in (False, True))
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {model}, {DTYPE}\n")
        print("| step | all of the last layer, ms | picked tokens alone, ms | saved µs | bits |")
        print("|---|---|---|---|---|")
        for name in sys.argv[2:] or STEPS:
            compare(name, STEPS[name], whole, picking)


if __name__ == "__main__":
    main()
