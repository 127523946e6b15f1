"""`RunnerWorld` on the GPU at hand, over a random model of any shape."""

import torch

from runner_world import RunnerWorld
from triode.cache.config import CacheConfig
from triode.models.build import build_runner
from triode.models.config import ModelConfig
from triode.models.grammar import GuideCompiler
from triode.models.progress import NullProgress
from triode.models.random_model import RandomTensors
from triode.models.runner import Runner
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
        self._start(built.num_blocks, seed)

    def __enter__(self) -> "DeviceWorld":
        return self

    def __exit__(self, *_: object) -> None:
        self.runner.close()
