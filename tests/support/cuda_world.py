"""`RunnerWorld` with the runner of a GPU: on one, or on Triton's interpreter, which computes on the CPU."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import torch

from runner_world import RunnerWorld, tiny_config, tiny_weights
from triode.kernels.gpu_traits import INTERPRETER
from triode.models.cuda.decoder import CudaDecoder
from triode.models.cuda.gpu import Mark
from triode.models.cuda.runner import CudaRunner
from triode.models.grammar import GuideCompiler


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

    def download(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.clone()

    def mark(self) -> Mark:
        return PassedMark()

    def end_step(self) -> Mark:
        return PassedMark()

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        self.num_captured += 1
        return work

    def cut(self) -> None:
        return

    def wait(self) -> None:
        return


class CudaWorld(RunnerWorld):
    """The same sequences through `CudaRunner`, interpreted."""

    def __init__(self, *, max_running: int = 8, seed: int = 0, guides: GuideCompiler | None = None) -> None:
        super().__init__(max_running=max_running, seed=seed, guides=guides)
        self.gpu = InterpretedGpu()
        with self.gpu.active():
            decoder = CudaDecoder(tiny_config(), tiny_weights(), self.gpu.traits, max_tokens=512, max_rows=32)
        self.runner = CudaRunner(decoder, self.pool, self.gpu, max_running=max_running, guides=guides)
