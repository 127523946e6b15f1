"""A model on a GPU that is not there: the steps of its runner launch every kernel that it would launch on one.

Belongs in `launches_compiled_for` or `launches_recorded`: nothing here can run. Tensors are on the meta device, which has
shapes and no memory, so the largest models fit.
"""

import msgspec
import torch

from runner_world import RunnerWorld, Running
from triode.cache.pool import KVPool
from triode.ids import BlockId
from triode.kernels.gpu_traits import GpuTraits
from triode.models.config import ModelConfig
from triode.models.cuda.decoder import CudaDecoder
from triode.models.cuda.rehearsal import AbsentGpu
from triode.models.cuda.runner import CudaRunner
from triode.models.random_model import random_config
from triode.models.step import Output
from triode.models.weights import allocate

META = torch.device("meta")
MAX_RUNNING = 256
LONG_TOKENS = 4096
SHORT_TOKENS = 64
NUM_BLOCKS = 2048
# Whether a kernel is launched depends on neither of these, nor does how it is compiled.
MAX_LAYERS = 2
MAX_CONTEXT_TOKENS = 8192


class AbsentWorld(RunnerWorld):
    """`RunnerWorld` without results: `launch` instead of `step`."""

    def __init__(
        self,
        model: str,
        dtype: torch.dtype,
        traits: GpuTraits,
        *,
        max_running: int = MAX_RUNNING,
        max_context_tokens: int = MAX_CONTEXT_TOKENS,
    ) -> None:
        config = _first_layers(random_config(model), max_context_tokens)
        pool = KVPool(
            NUM_BLOCKS,
            block_size_tokens=16,
            num_layers=config.num_layers,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            dtype=dtype,
            device=META,
        )
        gpu = AbsentGpu(traits)
        with gpu.active():
            decoder = CudaDecoder(
                config, allocate(config, dtype, META), traits, max_tokens=LONG_TOKENS, max_rows=MAX_RUNNING
            )
        self.cuda_runner = CudaRunner(decoder, pool, gpu, max_running=max_running)
        self.runner = self.cuda_runner
        self.free = list(map(BlockId, range(1, NUM_BLOCKS)))
        self.num_steps = 0
        self.num_epochs = 0
        self.admissions = []
        self.changes = []
        self.copies = []

    def launch(self, *rows: tuple[Running, int], output: Output = Output.SAMPLE) -> None:
        """A step of these rows: (sequence, query tokens)."""
        self.runner.launch(self.plan(*[(running, num_tokens, output) for running, num_tokens in rows]))
        for running, num_tokens in rows:
            running.num_computed += num_tokens

    def play(self) -> None:
        """Every kind of step: prompts long and short, a chunk that samples nothing and a short one behind it, a token alone,
        chunks beside decoding rows, batches of every size.
        """
        rows = [self.admit(0, [1] * LONG_TOKENS)]
        self.launch((rows[0], LONG_TOKENS))
        self.launch((rows[0], 1))
        rows.append(self.admit(1, [1] * (LONG_TOKENS + SHORT_TOKENS)))
        self.launch((rows[1], LONG_TOKENS), output=Output.NONE)
        self.launch((rows[1], SHORT_TOKENS))
        for length in (1000, 600, 200, 2):
            rows.append(self.admit(len(rows), [1] * length))
            self.launch((rows[-1], length), *[(row, 1) for row in rows[:-1]])
        for num_rows in (5, 17, 33, 65, 200, MAX_RUNNING):
            new = [self.admit(slot, [1]) for slot in range(len(rows), num_rows)]
            rows += new
            self.launch(*[(row, 1) for row in rows])


def _first_layers(config: ModelConfig, max_context_tokens: int) -> ModelConfig:
    return msgspec.structs.replace(
        config,
        num_layers=min(config.num_layers, MAX_LAYERS),
        sliding_layers=config.sliding_layers[:MAX_LAYERS],
        max_context_tokens=min(config.max_context_tokens, max_context_tokens),
    )
