"""What an engine and its worker process say to each other, and how that becomes bytes.

    engine → worker      Open, then a StepPlan for every step, then Close; a CheckGuide, a ReleaseGuide and a Wake now and
                         then
    worker → engine      stages of progress, Built, then a Stepped for every plan, in order; a GuideChecked for every
                         CheckGuide, in any order; Failed is the last word

A worker that is another rank than the first takes no plans (`models/ranks.py`): Open, Built, Close are all that it says
and hears.

A message is msgpack behind its length, over a pair of connected stream sockets: a plan that admits 100,000 tokens is
larger than a datagram may be. Plan and result of a step of 256 rows take about 50 µs to encode and decode, half of it in
the engine (benchmarks/executors.py): little beside the step, so messages cross as they are. Either end may die at any
time, and the other one then reads the end of the stream.

This file imports neither Trio nor torch: the worker needs no loop, and the engine no tensors.
"""

from typing import TypeAlias

import msgspec

from triode import errors
from triode.actors.messages import ReleaseGuide
from triode.cache.config import CacheConfig
from triode.models.config import ModelConfig, ModelOptions
from triode.models.guide import Guide, Refusal
from triode.models.parallel import RankOrder
from triode.models.runner import RunnerStatistics
from triode.models.step import StepPlan, StepResult

OPEN_RUNNER = "triode.actors.executor.opening:open_runner"
"""Where the worker finds the function that makes its runner of an `Open`. Tests and benchmarks name others, which need no
model."""


class Open(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """What to load, and how much room to make."""

    options: ModelOptions
    cache: CacheConfig
    max_running: int
    max_step_tokens: int
    num_threads: int | None
    warm_guides: bool = False
    """Make the runner ready for guides before it is built."""
    ranks: RankOrder | None = None
    """The worker's place among those that compute the model together; None if it does so alone."""


class CheckGuide(msgspec.Struct, frozen=True, tag=True):
    """`Runner.check_guide`."""

    number: int
    guide: Guide


class Wake(msgspec.Struct, frozen=True, tag=True):
    """`Wakes.wake`, for a runner that has it."""


class Close(msgspec.Struct, frozen=True, tag=True):
    """Give everything back and leave."""


class StageBegan(msgspec.Struct, frozen=True, tag=True):
    """`Progress.stage`."""

    name: str
    total: int | None
    unit: str


class StageAdvanced(msgspec.Struct, frozen=True, tag=True):
    """`Progress.advance`."""

    amount: int


class StageDone(msgspec.Struct, frozen=True, tag=True):
    """`Progress.done`."""


class Built(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """The runner is there, and how it came out."""

    model: ModelConfig
    device: str
    dtype: str
    num_threads: int
    num_blocks: int
    """Block 0, which is nobody's, included."""
    weights_bytes: int
    kv_cache_bytes: int
    kernels: str
    step_bytes: int | None = None
    """Bytes of matrices that each step reads; None where that is not known."""
    wakes: bool = False
    """Whether the worker has a use for Wake."""


class Stepped(msgspec.Struct, frozen=True, tag=True):
    """A step's result, and the runner's figures after it."""

    result: StepResult
    statistics: RunnerStatistics


class GuideChecked(msgspec.Struct, frozen=True, tag=True):
    """The answer to the CheckGuide of this number."""

    number: int
    refusal: Refusal | None


class Failed(msgspec.Struct, frozen=True, tag=True):
    """The worker leaves because of an exception."""

    kind: str
    """The name of the exception's class."""
    message: str
    traceback: str

    def error(self) -> Exception:
        """The exception as the engine raises it: of the same class if the class is Triode's own or ValueError."""
        kind = _KINDS.get(self.kind)
        error = kind(self.message) if kind else errors.EngineFault(f"{self.kind} in the worker process: {self.message}")
        error.add_note(f"In the worker process:\n{self.traceback}")
        return error


_KINDS: dict[str, type[Exception]] = {
    "ValueError": ValueError,
    **{name: kind for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, Exception)},
}

FromEngine: TypeAlias = Open | StepPlan | CheckGuide | ReleaseGuide | Wake | Close
FromWorker: TypeAlias = StageBegan | StageAdvanced | StageDone | Built | Stepped | GuideChecked | Failed

from_engine: msgspec.msgpack.Decoder[FromEngine] = msgspec.msgpack.Decoder(FromEngine)
from_worker: msgspec.msgpack.Decoder[FromWorker] = msgspec.msgpack.Decoder(FromWorker)
_encoder = msgspec.msgpack.Encoder()
_LENGTH_BYTES = 4


def encode(message: FromEngine | FromWorker) -> bytes:
    """The message as it goes over the socket."""
    body = _encoder.encode(message)
    return len(body).to_bytes(_LENGTH_BYTES, "big") + body


class Frames:
    """Cuts what a socket received into messages."""

    def __init__(self) -> None:
        self._data = bytearray()

    @property
    def holds_some(self) -> bool:
        """Whether there is something of a message."""
        return bool(self._data)

    def feed(self, data: bytes) -> None:
        """Add what was received."""
        self._data += data

    def take(self) -> bytes | None:
        """The oldest message that is complete, ready to be decoded."""
        end = _LENGTH_BYTES + int.from_bytes(self._data[:_LENGTH_BYTES], "big")
        if len(self._data) < max(end, _LENGTH_BYTES):
            return None
        body = bytes(self._data[_LENGTH_BYTES:end])
        del self._data[:end]
        return body
