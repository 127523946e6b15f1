"""The device as the runner uses it: one stream, transfers that nobody waits for, marks, captured work.

Everything that a runner computes is in the order of its one stream. Buffers may therefore be reused by the next step as
they are, and block copies, table changes and cancelled requests need no other synchronisation.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from triode.kernels.gpu_traits import GpuTraits


class Mark(Protocol):
    """A point in the stream."""

    def is_passed(self) -> bool:
        """Whether `wait` would return at once."""

    def wait(self) -> None:
        """Return once the device has passed it. Other threads run meanwhile."""

    def seconds_since(self, earlier: "Mark") -> float:
        """Device time between two marks that have been passed."""


class Gpu(Protocol):
    """What a runner asks of a device; `CudaGpu` is the one."""

    device: torch.device
    traits: GpuTraits

    @contextmanager
    def active(self) -> Iterator[None]:
        """Inside, work goes to the runner's stream."""

    def upload(self, array: npt.NDArray[np.int32]) -> torch.Tensor:
        """A copy on the device, in stream order."""

    def download(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy in host memory, there once a later mark has been passed."""

    def mark(self) -> Mark:
        """A mark behind all work so far."""

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """The work as one launch. What it has to compile must be compiled already."""

    def close(self) -> None:
        """Wait for all work, then give back what the device keeps for it."""


class CudaMark:
    """An event of the runner's stream."""

    def __init__(self) -> None:
        self._event = torch.cuda.Event(enable_timing=True)
        self._event.record()

    def is_passed(self) -> bool:
        """Asks the driver."""
        return bool(self._event.query())

    def wait(self) -> None:
        """Spins in the driver, without the interpreter's lock."""
        self._event.synchronize()

    def seconds_since(self, earlier: Mark) -> float:
        """To about a microsecond."""
        assert isinstance(earlier, CudaMark), "marks of one device"
        elapsed_ms: float = earlier._event.elapsed_time(self._event)
        return elapsed_ms / 1e3


class CudaGpu:
    """An NVIDIA GPU with a stream and a memory pool of CUDA graphs."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.traits = GpuTraits.of(device)
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        # What was written before, weights above all, comes first.
        self._stream.wait_stream(torch.cuda.current_stream(device))

    @contextmanager
    def active(self) -> Iterator[None]:
        """Inside, work goes to the runner's stream and records no gradients."""
        with torch.inference_mode(), torch.cuda.stream(self._stream):
            yield

    def upload(self, array: npt.NDArray[np.int32]) -> torch.Tensor:
        """By way of pinned memory, which torch keeps until the copy is done."""
        pinned = torch.empty(array.shape, dtype=torch.int32, pin_memory=True)
        pinned.numpy()[:] = array
        return pinned.to(self.device, non_blocking=True)

    def download(self, tensor: torch.Tensor) -> torch.Tensor:
        """Into pinned memory."""
        pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return pinned.copy_(tensor, non_blocking=True)

    def mark(self) -> Mark:
        """An event."""
        return CudaMark()

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """A CUDA graph."""
        graph = torch.cuda.CUDAGraph()
        # Other threads of the process may allocate meanwhile: they are none of our business.
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        try:
            work()
        finally:
            graph.capture_end()
        replay: Callable[[], None] = graph.replay
        return replay

    def close(self) -> None:
        """Also returns torch's cached memory to the driver, for whoever comes next."""
        self._stream.synchronize()
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()
