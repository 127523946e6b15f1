"""From a model on disk to a runner, in whichever process the runner lives."""

import dataclasses
from collections import deque

import torch

from triode.actors.executor.protocol import Built, Open
from triode.models.build import build_runner, check_choices, freed_one_by_one
from triode.models.config import ModelConfig
from triode.models.grammar import GuideCompiler
from triode.models.loader import Checkpoint, open_checkpoint, resolve_device, resolve_dtype
from triode.models.packed_load import load_packed
from triode.models.parallel import Follower, RankOrder, check_shares, share_of
from triode.models.progress import Progress
from triode.models.quantization import WeightPlan, plan_weights
from triode.models.ranked_build import build_follower
from triode.models.runner import Runner
from triode.models.shares import shared
from triode.models.weights import DecoderWeights


def open_runner(order: Open, progress: Progress) -> tuple[Runner | Follower, Built]:
    """Open the model and load it; a rank that is not the first one follows.

    Raises:
        ModelError: if the model cannot be loaded.
        InsufficientMemory: if it does not fit.
        ValueError: if an option does not suit the model or the machine.
    """
    checkpoint = open_checkpoint(order.options, progress)
    if order.ranks is not None and order.ranks.rank > 0:
        return _load_follower(checkpoint, order, order.ranks, progress)
    return load_runner(checkpoint, order, progress)


def load_runner(checkpoint: Checkpoint, order: Open, progress: Progress) -> tuple[Runner, Built]:
    """The same for a model that has been opened, and a worker that has the runner."""
    device, dtype, plan = _resolve(checkpoint, order, progress)
    config = checkpoint.config
    guides = GuideCompiler(checkpoint.tokenizer, config.vocab_size, config.eos_token_ids)
    if order.warm_guides:
        progress.stage("Preparing guides", None, "")
        guides.warm()
        progress.done()
    built = build_runner(
        config,
        # Not kept here: the decoder lays matrices out anew, and what it no longer needs becomes room for the cache.
        _load_weights(checkpoint, order, device, dtype, plan, progress),
        cache_config=order.cache,
        max_running=order.max_running,
        max_step_tokens=order.max_step_tokens,
        num_threads=order.num_threads,
        kernels=order.options.kernels,
        plan=plan,
        guides=guides,
        progress=progress,
        ranks=order.ranks,
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


def _load_follower(checkpoint: Checkpoint, order: Open, ranks: RankOrder, progress: Progress) -> tuple[Follower, Built]:
    device, dtype, plan = _resolve(checkpoint, order, progress)
    weights = _load_weights(checkpoint, order, device, dtype, plan, progress)
    layers = deque(weights.layers)
    follower = build_follower(
        checkpoint.config,
        dataclasses.replace(weights, layers=()),
        freed_one_by_one(layers),
        plan=plan,
        order=ranks,
        max_step_tokens=order.max_step_tokens,
        num_threads=order.num_threads,
        kernels=order.options.kernels,
        progress=progress,
    )
    return follower, Built(
        model=checkpoint.config,
        device=str(device),
        dtype=str(dtype).removeprefix("torch."),
        num_threads=torch.get_num_threads(),
        num_blocks=0,
        weights_bytes=0,
        kv_cache_bytes=0,
        kernels="",
    )


def _resolve(checkpoint: Checkpoint, order: Open, progress: Progress) -> tuple[torch.device, torch.dtype, WeightPlan]:
    """What the options come to here; whatever of them cannot be had is refused before weights are loaded."""
    options = order.options
    device = resolve_device(options.device)
    plan = plan_weights(options.quantization, options.quantization_group, options.quantization_overrides)
    if order.ranks is not None:
        _check_ranks(checkpoint.config, device, order.ranks.num_ranks)
    dtype = resolve_dtype(options.dtype, checkpoint.config, device)
    check_choices(
        device,
        dtype,
        cache_config=order.cache,
        kernels=options.kernels,
        plan=plan,
        progress=progress,
        ranks=order.ranks,
    )
    return device, dtype, plan


def _check_ranks(config: ModelConfig, device: torch.device, num_ranks: int) -> None:
    check_shares(config, num_ranks)
    if device.type != "cpu":
        raise ValueError(f"tensor_parallel must be 1 on a GPU, got {num_ranks}")


def _load_weights(
    checkpoint: Checkpoint,
    order: Open,
    device: torch.device,
    dtype: torch.dtype,
    plan: WeightPlan,
    progress: Progress,
) -> DecoderWeights:
    """All of them, or this rank's share."""
    options = order.options
    share = (0, 1)
    if order.ranks is not None:
        share = order.ranks.rank, order.ranks.num_ranks
        tensors = shared(checkpoint.config, checkpoint.tensors, *share)
        checkpoint = dataclasses.replace(checkpoint, config=share_of(checkpoint.config, share[1]), tensors=tensors)
    if options.packed_cache is None:
        return checkpoint.load_weights(dtype, device, progress, plan, order.ranks)
    if device.type != "cpu":
        raise ValueError(f"packed_cache must be None on a GPU, got {options.packed_cache!r}")
    return load_packed(checkpoint, options, dtype, plan, progress, share, order.ranks)
