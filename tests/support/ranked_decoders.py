"""Ranks of a decoder in one process: each has its thread, and nothing else differs from processes."""

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from msgspec.structs import replace

from native_steps import native_library
from paged_decoding import BLOCK_SIZE_TOKENS, PagedDecoding
from triode.actors.executor.rank_orders import rank_orders
from triode.models.config import ModelConfig
from triode.models.cpu import NativeChoice
from triode.models.parallel import RankOrder, share_of
from triode.models.progress import NullProgress
from triode.models.quantization import NOT_QUANTIZED, Quantization, WeightPlan, plan_weights
from triode.models.ranked_build import build_share
from triode.models.ranks import FollowingRank, LeadProgram
from triode.models.shares import shared
from triode.models.tensors import TensorReader, load_weights
from triode.models.weights import DecoderWeights, places

CPU = torch.device("cpu")
MAX_TOKENS = 256


@contextmanager
def ranked(
    config: ModelConfig, weights: DecoderWeights, num_ranks: int, quantization: Quantization = "none"
) -> Iterator[LeadProgram]:
    """A program of so many ranks, for steps of up to `MAX_TOKENS` tokens."""
    tensors, dtype = HeldTensors(config, weights), weights.embed_VD.dtype
    shares = [read_share(config, tensors, dtype, rank, num_ranks) for rank in range(num_ranks)]
    with ranks_of(config, shares, plan_weights(quantization)) as lead:
        yield lead


@contextmanager
def ranks_of(config: ModelConfig, shares: Sequence[DecoderWeights], plan: WeightPlan) -> Iterator[LeadProgram]:
    """The same of shares that have been read."""
    native = NativeChoice(native_library())
    with torch.inference_mode():
        with rank_orders(len(shares)) as theirs:
            orders = [_own(order) for order in theirs]
        followers = [
            FollowingRank(*build_share(config, share, share.layers, native, plan, order, MAX_TOKENS))
            for share, order in zip(shares[1:], orders[1:], strict=True)
        ]
        lead = LeadProgram(
            config, *build_share(config, shares[0], shares[0].layers, native, plan, orders[0], MAX_TOKENS)
        )
    threads = [threading.Thread(target=_obey, args=(follower,), daemon=True) for follower in followers]
    for thread in threads:
        thread.start()
    try:
        yield lead
    finally:
        lead.close()
        for thread in threads:
            thread.join()


def read_share(
    config: ModelConfig,
    tensors: TensorReader,
    dtype: torch.dtype,
    rank: int,
    num_ranks: int,
    plan: WeightPlan = NOT_QUANTIZED,
) -> DecoderWeights:
    """What a rank reads of a checkpoint."""
    reader = shared(config, tensors, rank, num_ranks)
    return load_weights(share_of(config, num_ranks), reader, dtype, CPU, NullProgress(), plan)


class HeldTensors:
    """A checkpoint of weights that are in memory."""

    def __init__(self, config: ModelConfig, weights: DecoderWeights) -> None:
        self._tensors = dict(places(config, weights))

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def label(self, name: str) -> str:
        return name

    def read_into(self, name: str, destination: torch.Tensor) -> None:
        destination.copy_(self._tensors[name])


def _own(order: RankOrder) -> RankOrder:
    """With file descriptors that nobody else closes."""
    return replace(order, memory_fd=os.dup(order.memory_fd), links=tuple(map(os.dup, order.links)))


def _obey(follower: FollowingRank) -> None:
    while follower.obey():
        pass
    follower.close()


class RankedDecoding(PagedDecoding):
    """Steps over a pool in every rank; only rank 0's begins full of NaN."""

    def __init__(self, lead: LeadProgram, num_blocks: int, kv_dtype: torch.dtype | None = None) -> None:
        super().__init__(lead, num_blocks, kv_dtype=kv_dtype)
        self.pool = lead.make_pool(num_blocks, BLOCK_SIZE_TOKENS, kv_dtype or lead.dtype)
        for tensor in (*self.pool.keys, *self.pool.values):
            tensor.fill_(-1 if tensor.dtype == torch.int8 else torch.nan)
        self.keys, self.values = list(self.pool.keys), list(self.pool.values)
