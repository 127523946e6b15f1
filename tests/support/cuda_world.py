"""`RunnerWorld` with the runner of a GPU: on one, or on Triton's interpreter, which computes on the CPU."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import torch

from runner_world import CPU, RunnerWorld, tiny_config, weights_of
from triode.cache.config import CacheConfig
from triode.cache.pool import KVPool
from triode.kernels.gpu_traits import INTERPRETER
from triode.models.build import BuiltRunner
from triode.models.config import ModelConfig
from triode.models.cuda.decoder import CudaDecoder
from triode.models.cuda.gpu import Mark
from triode.models.cuda.runner import CudaRunner
from triode.models.grammar import GuideCompiler
from triode.models.weights import DecoderWeights


class PassedMark:
    """Everything before it has been computed: there is no stream."""

    def is_passed(self) -> bool:
        return True

    def wait(self) -> None:
        return

    def seconds_since(self, earlier: Mark) -> float:
        return 1e-6

    def release(self) -> None:
        return


class InterpretedGpu:
    """A `Gpu` whose work is done when it is asked for."""

    device = torch.device("cpu")
    traits = INTERPRETER

    def __init__(self) -> None:
        self.num_captured = 0
        self.uploads: list[int] = []

    @contextmanager
    def active(self) -> Iterator[None]:
        with torch.inference_mode():
            yield

    def upload(self, array: npt.NDArray[np.int32], out: torch.Tensor | None = None) -> torch.Tensor:
        self.uploads.append(array.size)
        copy = torch.from_numpy(array.astype(np.int32, copy=True))
        return copy if out is None else out.copy_(copy)

    def upload_ahead(self, array: npt.NDArray[np.int32]) -> torch.Tensor:
        return self.upload(array)

    def download(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.clone()

    def mark(self) -> Mark:
        return PassedMark()

    def end_step(self) -> Mark:
        return PassedMark()

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        self.num_captured += 1
        return work

    def wait(self) -> None:
        return


def interpreted_runner(
    config: ModelConfig,
    weights: DecoderWeights,
    *,
    cache_config: CacheConfig,
    max_running: int,
    max_step_tokens: int,
    guides: GuideCompiler,
    **_: object,
) -> BuiltRunner:
    """What `build_runner` makes on a GPU, interpreted."""
    gpu = InterpretedGpu()
    block_bytes = 2 * config.num_layers * config.num_kv_heads * config.head_dim * cache_config.block_size_tokens * 4
    assert cache_config.kv_cache_bytes is not None
    with gpu.active():
        pool = KVPool(
            cache_config.kv_cache_bytes // block_bytes,
            block_size_tokens=cache_config.block_size_tokens,
            num_layers=config.num_layers,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            dtype=torch.float32,
            device=CPU,
        )
        decoder = CudaDecoder(config, weights, gpu.traits, max_tokens=512, max_rows=32)
    runner = CudaRunner(decoder, pool, gpu, max_running=max_running, guides=guides)
    return BuiltRunner(runner, pool.num_blocks, 1, 0, pool.num_bytes, torch.float32, None, "interpreted")


class CudaWorld(RunnerWorld):
    """The same sequences through `CudaRunner`, interpreted."""

    def __init__(
        self,
        config: ModelConfig | None = None,
        *,
        max_running: int = 8,
        seed: int = 0,
        guides: GuideCompiler | None = None,
    ) -> None:
        config = config or tiny_config()
        super().__init__(config, max_running=max_running, seed=seed, guides=guides)
        self.gpu = InterpretedGpu()
        with self.gpu.active():
            decoder = CudaDecoder(config, weights_of(config), self.gpu.traits, max_tokens=512, max_rows=32)
        self.runner = CudaRunner(decoder, self.pool, self.gpu, max_running=max_running, guides=guides)
