"""What an engine is put together from, once the model is loaded."""

from dataclasses import dataclass

import msgspec

from triode.actors.executor.actor import Executor
from triode.actors.tokenizer.prepare import Limits
from triode.cache.manager import CacheManager
from triode.engine.config import EngineConfig
from triode.models.tokenizer import Tokenizer


class Report(msgspec.Struct, frozen=True):
    """What was loaded, and how large it is."""

    model: str
    architecture: str
    device: str
    dtype: str
    num_threads: int
    max_context_tokens: int
    weights_bytes: int
    kv_cache_bytes: int
    num_blocks: int
    block_size_tokens: int
    kernels: str
    """The implementations in use."""
    executor: str
    load_s: float
    step_bytes: int | None = None
    """Bytes of matrices that each step reads; None where that is not known."""
    worker_pids: tuple[int, ...] = ()
    """The processes that compute, where they are others than this one."""

    @property
    def kv_cache_tokens(self) -> int:
        """Tokens for which the KV cache has room; block 0 is nobody's."""
        return (self.num_blocks - 1) * self.block_size_tokens

    def __str__(self) -> str:
        return (
            f"{self.model} ({self.architecture}) in {self.dtype} on {self.device}: "
            f"weights {self.weights_bytes / 2**20:.0f} MiB, KV cache {self.kv_cache_bytes / 2**20:.0f} MiB for "
            f"{self.kv_cache_tokens} tokens, kernels {self.kernels}, loaded in {self.load_s:.1f} s{self._where}"
        )

    @property
    def _where(self) -> str:
        if not self.worker_pids:
            return ""
        return f" by process{'es' * (len(self.worker_pids) > 1)} {', '.join(map(str, self.worker_pids))}"


@dataclass(frozen=True, slots=True)
class EngineParts:
    """The parts that differ between engines; `triode.engine.hub` joins them."""

    config: EngineConfig
    tokenizer: Tokenizer
    cache: CacheManager
    executor: Executor
    limits: Limits
    report: Report
