"""The device as the runner uses it: one stream, transfers that nobody waits for, marks, captured work.

Everything that a runner computes is in the order of its one stream; only masks are sent beside it. Buffers may therefore be
reused by the next step as they are, and block copies, table changes and cancelled requests need no other synchronisation.

Host memory of transfers is pinned once and lent to one step after the other; pinning waits for the device, so what the
largest steps need is pinned before the first one. Torch's own allocator of pinned memory must
not serve here: it marks a freed block in the stream, whichever thread frees it, and a mark within a capture is an error.
"""

from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol
from weakref import WeakSet

import numpy as np
import numpy.typing as npt
import torch

from triode.kernels.gpu_traits import GpuTraits

_LEAST_PINNED_BYTES = 4096
_MOST_STOCKED_BYTES = 2**18
_STOCK = 4
"""Pieces of host memory of each size: a step takes one or two, and two steps are under way."""
_STOCK_OF_LEAST = 32
"""What rows of a new set are told the passes takes some ten of these."""


class Mark(Protocol):
    """A point in the stream."""

    def is_passed(self) -> bool:
        """Whether `wait` would return at once."""

    def wait(self) -> None:
        """Return once the device has passed it. Other threads run meanwhile."""

    def seconds_since(self, earlier: "Mark") -> float:
        """Device time between two marks that have been passed."""

    def release(self) -> None:
        """What was transferred has been read. At most once, when the mark has been passed."""


class Gpu(Protocol):
    """What a runner asks of a device; `CudaGpu` is the one."""

    device: torch.device
    traits: GpuTraits

    @contextmanager
    def active(self) -> Iterator[None]:
        """Inside, work goes to the runner's stream."""

    def upload(self, array: npt.NDArray[np.int32], out: torch.Tensor | None = None) -> torch.Tensor:
        """A copy on the device, in stream order; into `out` if it is given."""

    def upload_ahead(self, array: npt.NDArray[np.int32]) -> torch.Tensor:
        """A copy on the device that is made beside what the stream has yet to do; only what follows in the stream may read it.
        The host has waited for what read the last one."""

    def download(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy in host memory, there once a later mark has been passed, until the step's last mark is released."""

    def mark(self) -> Mark:
        """A mark behind all work so far."""

    def end_step(self) -> Mark:
        """The step's last mark; its `release` gives back the host memory of the step's transfers."""

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """The work as one launch. What it has to compile must be compiled already."""

    def wait(self) -> None:
        """Until all work is done."""


class CudaMark:
    """An event of the runner's stream, and host memory that is in use until then."""

    def __init__(self, stream: torch.cuda.Stream, release: Callable[[], None] = lambda: None) -> None:
        self.release = release
        self._event = torch.cuda.Event(enable_timing=True)
        self._event.record(stream)

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


_IN_USE: "WeakSet[CudaGpu]" = WeakSet()


class CudaGpu:
    """An NVIDIA GPU with a stream and a memory pool of CUDA graphs."""

    def __init__(self, device: torch.device) -> None:
        _IN_USE.add(self)
        self.device = device
        self.traits = GpuTraits.of(device)
        self._stream = torch.cuda.Stream(device)
        self._side = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        self._idle: defaultdict[int, deque[torch.Tensor]] = defaultdict(deque)
        self._lent: list[torch.Tensor] = []
        size = _LEAST_PINNED_BYTES
        while size <= _MOST_STOCKED_BYTES:
            num_pieces = _STOCK_OF_LEAST if size == _LEAST_PINNED_BYTES else _STOCK
            self._idle[size] += torch.empty(num_pieces, size, dtype=torch.uint8, pin_memory=True).unbind()
            size *= 2
        # What was written before, weights above all, comes first.
        self._stream.wait_stream(torch.cuda.current_stream(device))

    @contextmanager
    def active(self) -> Iterator[None]:
        """Inside, work goes to the runner's stream and records no gradients."""
        with torch.inference_mode(), torch.cuda.stream(self._stream):
            yield

    def upload(self, array: npt.NDArray[np.int32], out: torch.Tensor | None = None) -> torch.Tensor:
        """By way of pinned memory."""
        pinned = self._borrow(torch.Size(array.shape), torch.int32)
        pinned.numpy()[:] = array
        if out is None:
            out = torch.empty(array.shape, dtype=torch.int32, device=self.device)
        return out.copy_(pinned, non_blocking=True)

    def upload_ahead(self, array: npt.NDArray[np.int32]) -> torch.Tensor:
        """By way of pinned memory and a stream of its own, whose memory nothing else writes to."""
        with torch.cuda.stream(self._side):
            copy = self.upload(array)
        self._stream.wait_stream(self._side)
        return copy

    def download(self, tensor: torch.Tensor) -> torch.Tensor:
        """Into pinned memory."""
        return self._borrow(tensor.shape, tensor.dtype).copy_(tensor, non_blocking=True)

    def mark(self) -> Mark:
        """An event."""
        return CudaMark(self._stream)

    def end_step(self) -> Mark:
        """An event."""
        lent, self._lent = self._lent, []

        def release() -> None:
            for memory in lent:
                self._idle[memory.numel()].append(memory)

        return CudaMark(self._stream, release)

    def _borrow(self, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        """Pinned memory, of a size that is a power of two so that it suits many."""
        num_bytes = shape.numel() * dtype.itemsize
        size = max(_LEAST_PINNED_BYTES, 1 << (num_bytes - 1).bit_length())
        try:
            memory = self._idle[size].popleft()
        except IndexError:
            memory = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        self._lent.append(memory)
        return memory[:num_bytes].view(dtype).view(shape)

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """A CUDA graph."""
        graph = torch.cuda.CUDAGraph()
        # Other threads of the process may allocate meanwhile: they are none of our business. This one may load a kernel of
        # cuBLASLt's.
        graph.capture_begin(pool=self._pool, capture_error_mode="relaxed")
        try:
            work()
        finally:
            graph.capture_end()
        replay: Callable[[], None] = graph.replay
        return replay

    def wait(self) -> None:
        """Synchronises the stream."""
        self._stream.synchronize()

    def forget_captured(self) -> None:
        """What was captured so far is gone, and its memory pool with it: what follows gets another one."""
        self._pool = torch.cuda.graph_pool_handle()

    def close(self) -> None:
        """Give back what the device keeps for work that nobody will ask for again.

        Also returns torch's cached memory to the driver, for whoever comes next.
        """
        self._idle.clear()
        self._lent.clear()
        _IN_USE.discard(self)
        # Torch keeps a workspace for each stream and frees all of them or none. The graphs of another engine have the
        # addresses of theirs in them, so the last engine frees for all.
        if not _IN_USE:
            torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()
