"""From weights to a runner: choose the kernels, bind the decoder to them, size the KV pool from what is left."""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from triode.cache.config import CacheConfig
from triode.cache.pool import KVPool, bytes_per_block, free_memory_bytes, num_blocks_for
from triode.kernels.native.cpus import usable_threads
from triode.kernels.threads import cpu_threads
from triode.models.ahead import AheadRunner
from triode.models.config import KernelChoice, ModelConfig
from triode.models.cpu import choose_native, cpu_program, describe_kernels
from triode.models.decoder import Decoder
from triode.models.eager import EagerRunner, RunnerSettings
from triode.models.grammar import GuideCompiler
from triode.models.native import NativeDecoder
from triode.models.parallel import RankOrder
from triode.models.progress import NullProgress, Progress
from triode.models.quantization import NOT_QUANTIZED, WeightPlan
from triode.models.ranked_build import build_share, library_for
from triode.models.ranks import LeadProgram
from triode.models.runner import Runner
from triode.models.weights import DecoderWeights, LayerWeights, allocate, places


@dataclass(frozen=True, slots=True)
class BuiltRunner:
    """A runner, and what a start-up line says about it."""

    runner: Runner
    num_blocks: int
    """Block 0, which absorbs padding, included."""
    num_threads: int
    weights_bytes: int
    """What is held of them, in whichever formats."""
    kv_cache_bytes: int
    kv_dtype: torch.dtype
    step_bytes: int | None
    """Bytes of matrices that each step reads; None where that is not known."""
    kernels: str
    """Each implementation in use, with its operations."""


def check_choices(
    device: torch.device,
    dtype: torch.dtype,
    *,
    cache_config: CacheConfig,
    kernels: KernelChoice = "auto",
    plan: WeightPlan = NOT_QUANTIZED,
    progress: Progress | None = None,
    ranks: RankOrder | None = None,
) -> None:
    """Refuse, before weights are loaded, what `build_runner` would refuse whatever they are.

    Raises:
        ValueError: an argument asks for what this machine does not have.
    """
    if device.type == "cuda":
        _check_for_gpu(kernels, plan, cache_config)
        return
    native = choose_native(dtype, kernels, plan, progress or NullProgress())
    _kv_dtype(cache_config, dtype, native.missing, is_native=native.library is not None)
    if ranks is not None:
        library_for(native, ranks)


def build_runner(
    config: ModelConfig,
    weights: DecoderWeights,
    *,
    cache_config: CacheConfig,
    max_running: int,
    max_step_tokens: int = 512,
    num_threads: int | None = None,
    kernels: KernelChoice = "auto",
    plan: WeightPlan = NOT_QUANTIZED,
    guides: GuideCompiler | None = None,
    progress: Progress | None = None,
    ranks: RankOrder | None = None,
) -> BuiltRunner:
    """A runner for `max_running` sequences, where the weights are. Keys and values are kept in the weights' dtype, or as int8.

    On a GPU, and for `ranks`, buffers are made for steps of `max_step_tokens` tokens; else a step may have any number
    on the CPU.

    The decoder lays matrices out anew. If the caller keeps no reference to `weights`, each layer is freed as soon as the
    decoder has its own, so that never more than one layer exists twice. `config` is the whole model's also where `weights` are
    the share of one of several `ranks`.

    Raises:
        InsufficientMemory: the cache does not fit beside the weights.
        ValueError: `kernels` or `plan` asks for what this machine does not have.
    """
    progress = progress or NullProgress()
    if weights.embed_VD.device.type == "cuda":
        _check_for_gpu(kernels, plan, cache_config)
        return _build_on_gpu(config, weights, cache_config, max_running, max_step_tokens, guides, progress)
    dtype = weights.embed_VD.dtype
    native = choose_native(dtype, kernels, plan, progress)
    num_threads = num_threads or usable_threads(torch.get_num_threads())
    kv_dtype = _kv_dtype(cache_config, dtype, native.missing, is_native=native.library is not None)
    progress.stage("Preparing kernels", None, "")
    with torch.inference_mode(), cpu_threads(num_threads):
        num_threads_used = torch.get_num_threads()
        layers = deque(weights.layers)
        weights = replace(weights, layers=())
        rest = freed_one_by_one(layers)
        decoder = (
            cpu_program(config, weights, rest, native.library, plan)
            if ranks is None
            else LeadProgram(config, *build_share(config, weights, rest, native, plan, ranks, max_step_tokens))
        )
    del weights
    progress.done()
    pool = _build_pool(config, cache_config, max_running, decoder, kv_dtype)
    settings: RunnerSettings = {
        "max_running": max_running,
        "num_threads": num_threads,
        # OpenMP's threads spin for milliseconds after an operation, on processors that the compiled step has threads on.
        "sampling_threads": None if native.library is None else 1,
        "guides": guides,
    }
    return BuiltRunner(
        runner=_runner_of(decoder, pool, settings),
        num_blocks=pool.num_blocks,
        num_threads=num_threads_used,
        weights_bytes=_num_bytes(config, dtype) if isinstance(decoder, Decoder) else decoder.weights_bytes,
        kv_cache_bytes=pool.num_bytes * (1 if ranks is None else ranks.num_ranks),
        kv_dtype=kv_dtype,
        step_bytes=None if isinstance(decoder, Decoder) else decoder.matrices_bytes,
        kernels=describe_kernels(decoder.kernels.names, native.missing),
    )


def _runner_of(decoder: NativeDecoder | Decoder | LeadProgram, pool: KVPool, settings: RunnerSettings) -> Runner:
    if isinstance(decoder, NativeDecoder):
        return AheadRunner(decoder, pool, **settings)
    return EagerRunner(decoder, pool, **settings)


def _check_for_gpu(kernels: KernelChoice, plan: WeightPlan, cache_config: CacheConfig) -> None:
    if kernels != "auto":
        raise ValueError(f"kernels must be auto on a GPU, got {kernels!r}")
    if not plan.is_plain:
        raise ValueError(f"quantization must be none on a GPU, got '{plan}'")
    if cache_config.kv_dtype != "auto":
        raise ValueError(f"kv_dtype must be auto on a GPU, got {cache_config.kv_dtype!r}")


def _build_on_gpu(
    config: ModelConfig,
    weights: DecoderWeights,
    cache_config: CacheConfig,
    max_running: int,
    max_step_tokens: int,
    guides: GuideCompiler | None,
    progress: Progress,
) -> BuiltRunner:
    progress.stage("Preparing kernels", None, "")
    # Imported here: no CPU path needs Triton.
    from triode.models.cuda.build import build_cuda

    cuda = build_cuda(
        config,
        weights,
        cache_config=cache_config,
        max_running=max_running,
        max_step_tokens=max_step_tokens,
        guides=guides,
    )
    progress.done()
    return BuiltRunner(
        runner=cuda.runner,
        num_blocks=cuda.pool.num_blocks,
        num_threads=torch.get_num_threads(),
        weights_bytes=_num_bytes(config, weights.embed_VD.dtype),
        kv_cache_bytes=cuda.pool.num_bytes,
        kv_dtype=weights.embed_VD.dtype,
        step_bytes=None,
        kernels=cuda.kernels,
    )


def _num_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    return sum(view.nbytes for _, view in places(config, allocate(config, dtype, "meta")))


def freed_one_by_one(layers: deque[LayerWeights]) -> Iterator[LayerWeights]:
    """Each in its turn, kept by nobody but the caller from then on."""
    while layers:
        yield layers.popleft()


def _kv_dtype(cache_config: CacheConfig, dtype: torch.dtype, missing: str | None, *, is_native: bool) -> torch.dtype:
    if cache_config.kv_dtype == "auto":
        return dtype
    if not is_native:
        reason = missing or "the torch kernels were asked for"
        raise ValueError(f"kv_dtype must be auto here, got {cache_config.kv_dtype!r}: {reason}")
    return torch.int8


def _build_pool(
    config: ModelConfig,
    cache_config: CacheConfig,
    max_running: int,
    decoder: NativeDecoder | Decoder | LeadProgram,
    kv_dtype: torch.dtype,
) -> KVPool:
    block_bytes = bytes_per_block(
        block_size_tokens=cache_config.block_size_tokens,
        num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        dtype=kv_dtype,
    )
    blocks_a_sequence = -(-config.max_context_tokens // cache_config.block_size_tokens)
    free_bytes = decoder.free_bytes if isinstance(decoder, LeadProgram) else free_memory_bytes(decoder.device)
    num_blocks = num_blocks_for(cache_config, block_bytes, free_bytes, max_running * blocks_a_sequence)
    if isinstance(decoder, LeadProgram):
        return decoder.make_pool(num_blocks, cache_config.block_size_tokens, kv_dtype)
    return KVPool(
        num_blocks,
        block_size_tokens=cache_config.block_size_tokens,
        num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        dtype=kv_dtype,
        device=decoder.device,
    )
