"""From a model's name to the parts of an engine. Runs in a worker thread, and ends early when its caller is cancelled."""

import logging
import time
from functools import partial

import trio

from triode.engine.config import EngineConfig
from triode.engine.parts import EngineParts, Report
from triode.ids import TokenId
from triode.models.progress import NullProgress, Progress

_LOG = logging.getLogger("triode")


async def load(config: EngineConfig, progress: Progress | None) -> EngineParts:
    """Load the model, size the KV cache and say what came of it.

    Raises:
        ModelError: if the model cannot be loaded.
        InsufficientMemory: if it does not fit.
    """
    parts = await trio.to_thread.run_sync(partial(build, config, _Cancellable(progress or NullProgress())))
    _LOG.info("%s", parts.report)
    return parts


def build(config: EngineConfig, progress: Progress) -> EngineParts:
    """The same, synchronously."""
    start_s = time.perf_counter()
    progress.stage("Starting torch", None, "")
    # Imported here, in the worker thread: torch takes seconds to import, and the event loop must go on.
    from triode.actors.executor.inline import InlineExecutor
    from triode.actors.executor.thread import ThreadExecutor
    from triode.actors.tokenizer.prepare import Limits
    from triode.cache.manager import CacheManager
    from triode.models.build import build_runner
    from triode.models.loader import open_checkpoint, resolve_device, resolve_dtype

    progress.done()
    checkpoint = open_checkpoint(config.options, progress)
    device = resolve_device(config.options.device)
    dtype = resolve_dtype(config.options.dtype, checkpoint.config, device)
    built = build_runner(
        checkpoint.config,
        # Not kept here: the decoder lays matrices out anew, and what it no longer needs becomes room for the cache.
        checkpoint.load_weights(dtype, device, progress),
        cache_config=config.cache,
        max_running=config.scheduler.max_running,
        num_threads=config.num_threads,
        progress=progress,
    )
    executor = InlineExecutor(built.runner) if config.executor == "inline" else ThreadExecutor(built.runner)
    model = checkpoint.config
    return EngineParts(
        config=config,
        tokenizer=checkpoint.tokenizer,
        cache=CacheManager(built.num_blocks, config.cache),
        executor=executor,
        limits=Limits(
            max_context_tokens=model.max_context_tokens,
            pool_tokens=(built.num_blocks - 1) * config.cache.block_size_tokens,
            block_size_tokens=config.cache.block_size_tokens,
            vocab_size=model.vocab_size,
            eos_token_ids=tuple(map(TokenId, model.eos_token_ids)),
        ),
        report=Report(
            model=config.options.model,
            architecture=model.architecture,
            device=str(device),
            dtype=str(dtype).removeprefix("torch."),
            num_threads=built.num_threads,
            max_context_tokens=model.max_context_tokens,
            weights_bytes=built.weights_bytes,
            kv_cache_bytes=built.kv_cache_bytes,
            num_blocks=built.num_blocks,
            block_size_tokens=config.cache.block_size_tokens,
            kernels=built.kernels,
            executor=type(executor).__name__.removesuffix("Executor").lower(),
            load_s=time.perf_counter() - start_s,
        ),
    )


class _Cancellable:
    """Passes progress on, and stops the loading between two tensors when its caller has been cancelled."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def stage(self, name: str, total: int | None, unit: str) -> None:
        trio.from_thread.check_cancelled()
        self._progress.stage(name, total, unit)

    def advance(self, amount: int) -> None:
        trio.from_thread.check_cancelled()
        self._progress.advance(amount)

    def done(self) -> None:
        self._progress.done()
