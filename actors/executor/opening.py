"""From a model on disk to a runner, in whichever process the runner lives."""

import torch

from triode.actors.executor.protocol import Built, Open
from triode.models.build import build_runner
from triode.models.config import ModelOptions
from triode.models.grammar import GuideCompiler
from triode.models.loader import Checkpoint, open_checkpoint, resolve_device, resolve_dtype
from triode.models.packed_load import load_packed
from triode.models.progress import Progress
from triode.models.quantization import WeightPlan, plan_weights
from triode.models.runner import Runner
from triode.models.weights import DecoderWeights


def open_runner(order: Open, progress: Progress) -> tuple[Runner, Built]:
    """Open the model and load it.

    Raises:
        ModelError: if the model cannot be loaded.
        InsufficientMemory: if it does not fit.
        ValueError: if an option does not suit the model or the machine.
    """
    return load_runner(open_checkpoint(order.options, progress), order, progress)


def load_runner(checkpoint: Checkpoint, order: Open, progress: Progress) -> tuple[Runner, Built]:
    """The same for a model that has been opened."""
    device = resolve_device(order.options.device)
    dtype = resolve_dtype(order.options.dtype, checkpoint.config, device)
    config = checkpoint.config
    plan = plan_weights(
        order.options.quantization, order.options.quantization_group, order.options.quantization_overrides
    )
    guides = GuideCompiler(checkpoint.tokenizer, config.vocab_size, config.eos_token_ids)
    if order.warm_guides:
        progress.stage("Preparing guides", None, "")
        guides.warm()
        progress.done()
    built = build_runner(
        config,
        # Not kept here: the decoder lays matrices out anew, and what it no longer needs becomes room for the cache.
        _load_weights(checkpoint, order.options, device, dtype, plan, progress),
        cache_config=order.cache,
        max_running=order.max_running,
        max_step_tokens=order.max_step_tokens,
        num_threads=order.num_threads,
        kernels=order.options.kernels,
        plan=plan,
        guides=guides,
        progress=progress,
    )
    return built.runner, Built(
        model=checkpoint.config,
        device=str(device),
        dtype=str(dtype).removeprefix("torch."),
        num_threads=built.num_threads,
        num_blocks=built.num_blocks,
        weights_bytes=built.weights_bytes,
        kv_cache_bytes=built.kv_cache_bytes,
        kernels=built.kernels,
        step_bytes=built.step_bytes,
    )


def _load_weights(
    checkpoint: Checkpoint,
    options: ModelOptions,
    device: torch.device,
    dtype: torch.dtype,
    plan: WeightPlan,
    progress: Progress,
) -> DecoderWeights:
    if options.packed_cache is None:
        return checkpoint.load_weights(dtype, device, progress, plan)
    if device.type != "cpu":
        raise ValueError(f"packed_cache must be None on a GPU, got {options.packed_cache!r}")
    return load_packed(checkpoint, options, dtype, plan, progress)
