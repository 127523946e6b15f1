"""`RunnerWorld` on the GPU at hand, over a random model of any shape."""

from random import Random

import torch

from runner_world import RunnerWorld
from triode.cache.config import CacheConfig
from triode.cache.messages import BlockCopy
from triode.ids import BlockId
from triode.models.build import build_runner
from triode.models.config import ModelConfig
from triode.models.grammar import GuideCompiler
from triode.models.progress import NullProgress
from triode.models.random_model import RandomTensors
from triode.models.runner import Runner
from triode.models.step import Admission, TableChange
from triode.models.tensors import load_weights

CUDA = torch.device("cuda")


class DeviceWorld(RunnerWorld):
    """A runner as `build_runner` makes it, and its blocks in random order."""

    def __init__(
        self,
        config: ModelConfig,
        dtype: torch.dtype,
        *,
        max_running: int = 64,
        max_step_tokens: int = 4096,
        seed: int = 0,
        kv_cache_bytes: int = 2**30,
        guides: GuideCompiler | None = None,
    ) -> None:
        built = build_runner(
            config,
            load_weights(config, RandomTensors(config, 0), dtype, CUDA, NullProgress()),
            cache_config=CacheConfig(kv_cache_bytes=kv_cache_bytes),
            max_running=max_running,
            max_step_tokens=max_step_tokens,
            guides=guides,
        )
        self.runner: Runner = built.runner
        self.free = list(map(BlockId, range(1, built.num_blocks)))
        Random(seed).shuffle(self.free)
        self.num_steps = 0
        self.num_epochs = 0
        self.admissions: list[Admission] = []
        self.changes: list[TableChange] = []
        self.copies: list[BlockCopy] = []

    def __enter__(self) -> "DeviceWorld":
        return self

    def __exit__(self, *_: object) -> None:
        self.runner.close()
