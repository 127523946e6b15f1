"""Ranks of a decoder in one process: each has its thread, and nothing else differs from processes."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from native_steps import native_library
from paged_decoding import BLOCK_SIZE_TOKENS, PagedDecoding
from triode.actors.executor.ties import Ties
from triode.models.config import ModelConfig
from triode.models.cpu import NativeChoice
from triode.models.parallel import RankOrder
from triode.models.quantization import Quantization, plan_weights
from triode.models.ranked_build import build_lead, build_share
from triode.models.ranks import FollowingRank, LeadProgram
from triode.models.weights import DecoderWeights

MAX_TOKENS = 256


@contextmanager
def ranked(
    config: ModelConfig, weights: DecoderWeights, num_ranks: int, quantization: Quantization = "none"
) -> Iterator[LeadProgram]:
    """A program of so many ranks, for steps of up to `MAX_TOKENS` tokens."""
    native, plan = NativeChoice(native_library()), plan_weights(quantization)
    with torch.inference_mode():
        with Ties(num_ranks) as ties:
            orders = [_own(ties.order(rank)) for rank in range(num_ranks)]
        followers = [
            FollowingRank(*build_share(config, weights, weights.layers, native, plan, order, MAX_TOKENS))
            for order in orders[1:]
        ]
        lead = build_lead(config, weights, weights.layers, native, plan, orders[0], MAX_TOKENS)
    threads = [threading.Thread(target=_obey, args=(follower,), daemon=True) for follower in followers]
    for thread in threads:
        thread.start()
    try:
        yield lead
    finally:
        lead.close()
        for thread in threads:
            thread.join()


def _own(order: RankOrder) -> RankOrder:
    """With file descriptors that nobody else closes."""
    return RankOrder(
        rank=order.rank,
        num_ranks=order.num_ranks,
        memory_fd=os.dup(order.memory_fd),
        links=tuple(map(os.dup, order.links)),
    )


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
