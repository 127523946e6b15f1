"""From a model's name to the parts of an engine. Blocking work is done in a thread or in the worker process, and ends
early when the caller is cancelled."""

import logging
import os
import time
from dataclasses import dataclass
from functools import partial

from msgspec.structs import replace

from triode.actors.executor.actor import Executor
from triode.actors.executor.inline import InlineExecutor
from triode.actors.executor.process import ProcessExecutor
from triode.actors.executor.protocol import Built, Open
from triode.actors.executor.thread import ThreadExecutor
from triode.actors.tokenizer.prepare import Limits
from triode.cache.manager import CacheManager
from triode.engine.config import EngineConfig
from triode.engine.loading_thread import load_in_a_thread
from triode.engine.parts import EngineParts, Report
from triode.ids import TokenId
from triode.kernels.native.numa import choose_places
from triode.kernels.openmp import spinning_bounded
from triode.models.progress import NullProgress, Progress
from triode.models.source import RANDOM_PREFIX, locate
from triode.models.tokenizer import Tokenizer
from triode.models.tokenizer_source import open_tokenizer

_LOG = logging.getLogger("triode")


@dataclass(frozen=True, slots=True)
class _Loaded:
    tokenizer: Tokenizer
    executor: Executor
    built: Built


async def load(config: EngineConfig, progress: Progress | None) -> EngineParts:
    """Load the model, size the KV cache and say what came of it.

    Raises:
        ModelError: if the model cannot be loaded.
        InsufficientMemory: if it does not fit.
        ValueError: if an option does not suit the model or the machine.
        EngineFault: if the worker process died.
    """
    start_s = time.perf_counter()
    progress = progress or NullProgress()
    order = Open(
        options=config.options,
        cache=config.cache,
        max_running=config.scheduler.max_running,
        max_step_tokens=config.scheduler.max_step_tokens,
        num_threads=config.num_threads,
        warm_guides=config.warm_guides,
    )
    if config.runs_in_workers:
        loaded = await _load_in_worker(config, order, progress)
    else:
        is_inline = config.executor == "inline"
        loaded = await load_in_a_thread(partial(_load_here, order, is_inline=is_inline), progress)
    parts = _assemble(config, loaded, time.perf_counter() - start_s)
    _LOG.info("%s", parts.report)
    return parts


def _load_here(order: Open, progress: Progress, *, is_inline: bool) -> _Loaded:
    if not order.options.model.startswith(RANDOM_PREFIX):
        # Before torch's import, so that a misspelt name is told at once.
        path = locate(order.options.model, progress)
        order = replace(order, options=replace(order.options, model=str(path)))
    progress.stage("Starting torch", None, "")
    # Imported here, in a worker thread: torch takes seconds to import, and the event loop must go on.
    with spinning_bounded(os.environ):
        from triode.actors.executor.opening import load_runner
        from triode.models.loader import open_checkpoint

    progress.done()
    checkpoint = open_checkpoint(order.options, progress)
    runner, built = load_runner(checkpoint, order, progress)
    return _Loaded(checkpoint.tokenizer, InlineExecutor(runner) if is_inline else ThreadExecutor(runner), built)


async def _load_in_worker(config: EngineConfig, order: Open, progress: Progress) -> _Loaded:
    """The tokenizer is read in this process, which imports no torch, while the worker imports it."""
    executor = ProcessExecutor(places=choose_places(config.tensor_parallel, config.numa_nodes))
    try:
        # Before the worker opens the model, so that one process downloads it and the other one finds it.
        tokenizer = await load_in_a_thread(partial(open_tokenizer, order.options.model), progress)
        return _Loaded(tokenizer, executor, await executor.open(order, progress))
    except BaseException:
        await executor.kill()
        raise


def _assemble(config: EngineConfig, loaded: _Loaded, load_s: float) -> EngineParts:
    built = loaded.built
    return EngineParts(
        config=config,
        tokenizer=loaded.tokenizer,
        cache=CacheManager(built.num_blocks, config.cache),
        executor=loaded.executor,
        limits=Limits(
            max_context_tokens=built.model.max_context_tokens,
            pool_tokens=(built.num_blocks - 1) * config.cache.block_size_tokens,
            block_size_tokens=config.cache.block_size_tokens,
            vocab_size=built.model.vocab_size,
            eos_token_ids=tuple(map(TokenId, built.model.eos_token_ids)),
        ),
        report=Report(
            model=config.options.model,
            architecture=built.model.architecture,
            device=built.device,
            dtype=built.dtype,
            num_threads=built.num_threads,
            max_context_tokens=built.model.max_context_tokens,
            weights_bytes=built.weights_bytes,
            kv_cache_bytes=built.kv_cache_bytes,
            num_blocks=built.num_blocks,
            block_size_tokens=config.cache.block_size_tokens,
            kernels=built.kernels,
            executor=type(loaded.executor).__name__.removesuffix("Executor").lower(),
            load_s=load_s,
            step_bytes=built.step_bytes,
            worker_pids=tuple(executor.pids) if isinstance(executor := loaded.executor, ProcessExecutor) else (),
        ),
    )
