"""From a rank's share of a model's weights (`shares.py`) to its part of the program (`ranks.py`)."""

from collections.abc import Iterable

import torch

from triode.kernels.native.cpus import usable_threads
from triode.kernels.native.library import NativeLibrary
from triode.models.config import KernelChoice, ModelConfig
from triode.models.cpu import NativeChoice, choose_native
from triode.models.native import NativeDecoder
from triode.models.parallel import RankOrder, share_of
from triode.models.progress import Progress
from triode.models.quantization import WeightPlan
from triode.models.rank_memory import RankMemory
from triode.models.ranks import FollowingRank
from triode.models.shares import with_share_of_head
from triode.models.weights import DecoderWeights, LayerWeights


def build_follower(
    config: ModelConfig,
    weights: DecoderWeights,
    layers: Iterable[LayerWeights],
    *,
    plan: WeightPlan,
    order: RankOrder,
    max_step_tokens: int,
    num_threads: int | None,
    kernels: KernelChoice,
    progress: Progress,
) -> FollowingRank:
    """Another rank's part. Torch's number of threads in this process becomes that of its steps.

    Raises:
        ValueError: as of `build_share`.
    """
    native = choose_native(weights.embed_VD.dtype, kernels, plan, progress)
    torch.set_num_threads(num_threads or usable_threads(torch.get_num_threads()))
    with torch.inference_mode():
        return FollowingRank(*build_share(config, weights, layers, native, plan, order, max_step_tokens))


def build_share(
    config: ModelConfig,
    weights: DecoderWeights,
    layers: Iterable[LayerWeights],
    native: NativeChoice,
    plan: WeightPlan,
    order: RankOrder,
    max_step_tokens: int,
) -> tuple[NativeDecoder, RankMemory]:
    """A rank's decoder and what it shares with the others: what `LeadProgram` or `FollowingRank` is made of.

    Raises:
        ValueError: the model cannot be divided by the number of ranks, or there is no compiled step.
    """
    library = library_for(native, order)
    memory = RankMemory(order, config, weights.embed_VD.dtype, max_step_tokens)
    weights = with_share_of_head(config, weights, order.rank, order.num_ranks)
    return NativeDecoder(share_of(config, order.num_ranks), weights, library, layers, plan, memory.struct), memory


def library_for(native: NativeChoice, order: RankOrder) -> NativeLibrary:
    """The compiled step, which ranks cannot do without.

    Raises:
        ValueError: there is none.
    """
    if native.library is None:
        reason = native.missing or "the torch kernels were asked for"
        raise ValueError(f"tensor_parallel must be 1 without native kernels, got {order.num_ranks}: {reason}")
    return native.library
