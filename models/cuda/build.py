"""From weights on a GPU to a runner: bind kernels, prove them, and size the KV pool from what is really free.

What is free is known only after the largest steps have run: torch's kernels are loaded when first used, libraries keep
workspaces, and each captured graph takes memory of its own. So the largest prefill step and the largest decode step run
once, over a pool of two blocks, and the cache is made of what they leave. Then all steps that have a graph are captured:
no request waits for what a start can do.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch

from triode.cache.config import CacheConfig
from triode.cache.pool import KVPool, bytes_per_block, free_memory_bytes, num_blocks_for
from triode.errors import EngineFault, InsufficientMemory
from triode.kernels.linear.blas import describe_blas, in_order
from triode.models.config import ModelConfig
from triode.models.cuda.arena import layout_for
from triode.models.cuda.decoder import CudaDecoder
from triode.models.cuda.gpu import CudaGpu
from triode.models.cuda.programs import PREFILL_TOKENS, bucket_for
from triode.models.cuda.rehearsal import Rehearsal, compile_ahead
from triode.models.cuda.runner import CudaRunner
from triode.models.grammar import GuideCompiler
from triode.models.logprobs import SCORED_POSITIONS
from triode.models.step import StepPlan
from triode.models.weights import DecoderWeights

# A GPU's memory is handed out in larger pieces: what one graph takes may not show.
_LEAST_GRAPH_BYTES = 2**20
# As the driver words CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE, of which Triton hands on the words alone.
_NO_PLACE = "too many blocks in cooperative launch"
# And CUDA_ERROR_OUT_OF_MEMORY: torch's allocator has an error of its own for it, graphs and Triton's launches have not.
_NO_MEMORY = "out of memory"


@dataclass(frozen=True, slots=True)
class BuiltCuda:
    """A runner, its pool, and what a start-up line says about its kernels."""

    runner: CudaRunner
    pool: KVPool
    kernels: str


def build_cuda(
    config: ModelConfig,
    weights: DecoderWeights,
    *,
    cache_config: CacheConfig,
    max_running: int,
    max_step_tokens: int,
    guides: GuideCompiler | None = None,
) -> BuiltCuda:
    """A runner for `max_running` sequences and steps of `max_step_tokens` tokens, on the device of the weights.

    Raises:
        InsufficientMemory: buffers or cache do not fit beside the weights.
        EngineFault: the process may not use as much of the GPU as a kernel needs at once.
    """
    device = weights.embed_VD.device
    max_rows = max(bucket_for(max_running), SCORED_POSITIONS)
    with ExitStack() as resources, explained(max_step_tokens, max_running):
        resources.enter_context(in_order(device))
        gpu = CudaGpu(device)
        # Also where opening fails.
        resources.callback(gpu.close)
        max_tokens = max(max_step_tokens, max_rows, PREFILL_TOKENS[-1])
        kinds = compile_ahead(
            config,
            weights.embed_VD.dtype,
            gpu.traits,
            block_size_tokens=cache_config.block_size_tokens,
            max_running=max_running,
            max_step_tokens=max_step_tokens,
            max_tokens=max_tokens,
            max_rows=max_rows,
            device=device,
        )
        with gpu.active():
            decoder = CudaDecoder(config, weights, gpu.traits, max_tokens=max_tokens, max_rows=max_rows)
        graph_bytes = _rehearse(decoder, gpu, cache_config, max_running, max_step_tokens)
        layout = layout_for(max_running, config.max_context_tokens, cache_config.block_size_tokens)
        reserved_bytes = layout.num_bytes + graph_bytes * sum(map(len, kinds))
        free_bytes = max(0, free_memory_bytes(device) - reserved_bytes)
        num_blocks = num_blocks_for(
            cache_config, _block_bytes(decoder, cache_config), free_bytes, max_running * layout.num_entries
        )
        pool = _pool(num_blocks, decoder, cache_config)
        kept = ExitStack()
        runner = CudaRunner(decoder, pool, gpu, max_running=max_running, guides=guides, resources=kept)
        runner.capture(kinds)
        kept.enter_context(resources.pop_all())
    return BuiltCuda(runner, pool, _describe(decoder))


def _rehearse(
    decoder: CudaDecoder, gpu: CudaGpu, cache_config: CacheConfig, max_running: int, max_step_tokens: int
) -> int:
    """Run the largest steps; returns how many bytes the graphs of one size of batch take."""
    runner = CudaRunner(decoder, _pool(2, decoder, cache_config), gpu, max_running=max_running)
    rehearsal = Rehearsal(cache_config.block_size_tokens, decoder.config.max_context_tokens)
    free_bytes = []
    for plan in steps_to_rehearse(rehearsal, max_running, max_step_tokens):
        runner.launch(plan)
        runner.collect()
        free_bytes.append(_free_bytes(decoder.device))
    # The pool and the graphs of the rehearsal go with its runner.
    runner.forget()
    del runner
    gpu.forget_captured()
    torch.cuda.empty_cache()
    return max(_LEAST_GRAPH_BYTES, free_bytes[-2] - free_bytes[-1])


def steps_to_rehearse(rehearsal: Rehearsal, max_running: int, max_step_tokens: int) -> Iterator[StepPlan]:
    """The largest steps, and all ways of sampling, of which few and many rows may take different kernels of torch's. The
    last one repeats the one before it, and is the first that is captured."""
    yield rehearsal.read(rehearsal.longest(max_step_tokens))
    yield from rehearsal.sample_in_all_ways(1)
    if max_running > 1:
        yield from rehearsal.sample_in_all_ways(min(max_running, max_step_tokens // 2))
        # One token has a kernel of its own, which a GPU that is shared may refuse: now rather than while it serves.
        yield rehearsal.decode(1)
    yield rehearsal.decode(max_running)
    yield rehearsal.decode(max_running)


def _free_bytes(device: torch.device) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    return free_memory_bytes(device)


def _block_bytes(decoder: CudaDecoder, cache_config: CacheConfig) -> int:
    config = decoder.config
    return bytes_per_block(
        block_size_tokens=cache_config.block_size_tokens,
        num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        dtype=decoder.dtype,
    )


def _pool(num_blocks: int, decoder: CudaDecoder, cache_config: CacheConfig) -> KVPool:
    config = decoder.config
    return KVPool(
        num_blocks,
        block_size_tokens=cache_config.block_size_tokens,
        num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        dtype=decoder.dtype,
        device=decoder.device,
    )


def _describe(decoder: CudaDecoder) -> str:
    exceptions = decoder.proofs.exceptions()
    kernels = f"Triton; {describe_blas(decoder.device)} for products of many tokens"
    if decoder.proofs.hopper_serves():
        kernels += " or CUDA C++, which computes SwiGLU, too"
    return f"{kernels}, but for {'; '.join(exceptions)}" if exceptions else kernels


@contextmanager
def explained(max_step_tokens: int, max_running: int) -> Iterator[None]:
    """Inside, what the GPU refuses rises as an error that says what to do.

    Raises:
        InsufficientMemory: it is out of memory.
        EngineFault: programs that wait for one another cannot all have a place.
    """
    try:
        yield
    except RuntimeError as error:
        if _NO_MEMORY in str(error):
            raise InsufficientMemory(
                f"the buffers of a step do not fit beside the weights: lower max_step_tokens ({max_step_tokens}) or "
                f"max_running ({max_running}), or close what else holds the GPU's memory"
            ) from error
        if _NO_PLACE not in str(error):
            raise
        raise EngineFault(
            "a kernel needs all of the GPU's multiprocessors at once, and this process may not use them all: unset "
            "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE, or whatever else limits its share of the GPU"
        ) from error
