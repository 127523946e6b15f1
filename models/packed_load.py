"""Weights by way of a file of packed ones: read from it if it suits, else loaded and written to it."""

import json
from dataclasses import replace
from pathlib import Path

import msgspec
import torch

from triode.kernels.native.library import NativeLibrary
from triode.models.config import ModelOptions
from triode.models.cpu import choose_native
from triode.models.loader import Checkpoint
from triode.models.packed_file import PackedFile
from triode.models.parallel import RankOrder
from triode.models.progress import Progress
from triode.models.quantization import WeightPlan
from triode.models.weights import DecoderWeights, allocate

CPU = torch.device("cpu")


def load_packed(
    checkpoint: Checkpoint,
    options: ModelOptions,
    dtype: torch.dtype,
    plan: WeightPlan,
    progress: Progress,
    share: tuple[int, int] = (0, 1),
    ranks: RankOrder | None = None,
) -> DecoderWeights:
    """The weights for `options.packed_cache`, which a decoder writes there if they were not taken from it.

    Args:
        checkpoint: the model, or one rank's share of it.
        options: which file, and what is asked of the kernels.
        dtype: of what is not rounded.
        plan: how each matrix is kept.
        progress: told why the file is made anew.
        share: whose it is, and of how many ranks; each has a file of its own, named after the one that was asked for.
        ranks: what all of them may take together.

    Raises:
        ModelError: the model cannot be loaded.
        InsufficientMemory: it does not fit.
        ValueError: native kernels cannot be had, or the file's folder does not exist.
    """
    assert options.packed_cache is not None, "there is a file to read or write"
    path = Path(options.packed_cache).expanduser()
    if share[1] > 1:
        path = path.with_name(f"{path.name}.{share[0]}of{share[1]}")
    if not path.parent.is_dir():
        raise ValueError(f"packed_cache must be in a folder that exists, got {str(path)!r}")
    library = choose_native(dtype, options.kernels, plan, progress).library
    if library is None:
        raise ValueError(f"packed_cache must be None without native kernels, got {str(path)!r}")
    file = PackedFile(path, _key(checkpoint, options, dtype, plan, library, share))
    found = file.read(ranks)
    if isinstance(found, str):
        progress.stage(f"Packing weights anew: {found}", None, "")
        progress.done()
        return replace(checkpoint.load_weights(dtype, CPU, progress, plan, ranks), pack_to=file)
    return replace(allocate(checkpoint.config, dtype, "meta"), packed=found)


def _key(
    checkpoint: Checkpoint,
    options: ModelOptions,
    dtype: torch.dtype,
    plan: WeightPlan,
    library: NativeLibrary,
    share: tuple[int, int],
) -> str:
    """What packed weights are made of: other files, another format or another build give another key."""
    stats = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in checkpoint.files]
    made_of = {
        "weights": [*stats, options.model, options.weights_seed],
        "config": msgspec.to_builtins(checkpoint.config),
        "dtype": str(dtype),
        "quantization": [plan.quantization, plan.group, [(p.pattern, choice) for p, choice in plan.overrides]],
        "build": library.build,
        "share": share,
    }
    return json.dumps(made_of, sort_keys=True)
