"""Ranks of the compiled step: the numbers of float64, the same bits in all company, and every copy everywhere."""

import random
import socket
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch

from exact_decoder import logits_float64
from model_files import write_tiny_gguf
from paged_decoding import PagedSequence
from ranked_decoders import CPU, RankedDecoding, ranked, ranks_of, read_share
from tiny_decoders import tiny_config, tiny_weights
from triode.cache.messages import BlockCopy
from triode.cache.pool import free_memory_bytes
from triode.ids import BlockId
from triode.models import ranks
from triode.models.config import ModelConfig, ModelOptions
from triode.models.loader import open_checkpoint
from triode.models.native import NativeDecoder
from triode.models.packed_load import load_packed
from triode.models.parallel import RankOrder, check_shares, outputs_of, share_of
from triode.models.progress import NullProgress
from triode.models.quantization import Quantization, plan_weights
from triode.models.random_model import random_config
from triode.models.rank_link import RankLink, Ready, free_together
from triode.models.rank_memory import RankMemory
from triode.models.ranks import FollowingRank, LeadProgram
from triode.models.shares import shared

CONFIGS = {
    "llama": (2, tiny_config()),
    "window, norms and biases": (
        2,
        tiny_config(sliding_window_tokens=40, sliding_layers=(True, False), qk_norm=True, qkv_bias=True),
    ),
    "ragged": (2, tiny_config(hidden_size=70, intermediate_size=82, vocab_size=101, head_dim=18)),
    "three ranks": (3, tiny_config(num_kv_heads=3, intermediate_size=99, vocab_size=130)),
    "one rank": (1, tiny_config()),
}
NUM_TOKENS = 135


def tokens(seed: int, config: ModelConfig, count: int = NUM_TOKENS) -> list[int]:
    return random.Random(seed).choices(range(config.vocab_size), k=count)


def logits_alone(
    lead: LeadProgram, token_ids: list[int], chunks: list[int], kv_dtype: torch.dtype | None = None
) -> torch.Tensor:
    decoding, sequence = RankedDecoding(lead, 30, kv_dtype), PagedSequence(list(token_ids))
    return torch.cat([decoding.step([(sequence, count)])[0] for count in chunks])


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_of_ranks_are_those_of_float64(name: str) -> None:
    num_ranks, config = CONFIGS[name]
    weights = tiny_weights(config, torch.float32)
    token_ids = tokens(0, config)
    expected = logits_float64(config, weights, token_ids)
    with ranked(config, weights, num_ranks) as lead:
        got = logits_alone(lead, token_ids, [100, 35])
    assert float((got.double() - expected).norm() / expected.norm()) < 2e-6


@pytest.mark.parametrize(("quantization", "kv_dtype"), [("none", None), ("a8w8", torch.int8), ("a16w4", None)], ids=str)
def test_chunks_neighbours_and_another_start_change_no_bit(
    quantization: Quantization, kv_dtype: torch.dtype | None
) -> None:
    config = tiny_config()
    weights = tiny_weights(config, torch.bfloat16)
    token_ids = tokens(1, config)
    with ranked(config, weights, 2, quantization) as lead:
        expected = logits_alone(lead, token_ids, [NUM_TOKENS], kv_dtype)
    assert expected.isfinite().all()
    with ranked(config, weights, 2, quantization) as lead:
        for chunks in ([1, 134], [64, 64, 7], [101] + [1] * 34):
            assert torch.equal(logits_alone(lead, token_ids, chunks, kv_dtype), expected)
        decoding, ours = RankedDecoding(lead, 200, kv_dtype), PagedSequence(token_ids)
        others = [PagedSequence(tokens(seed, config, 60)) for seed in range(5)]
        got = []
        for count, their_count in ((35, 20), (1, 1), (99, 30)):
            rows = [(other, their_count) for other in others]
            got.append(decoding.step([*rows[:2], (ours, count), *rows[2:]])[2])
    assert torch.equal(torch.cat(got), expected)


def test_ranks_keep_the_blocks_of_a_file(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "m.gguf", "llama", "Q8_0")
    checkpoint = open_checkpoint(ModelOptions(model=str(path)))
    config = checkpoint.config
    token_ids = tokens(3, config, 50)
    expected = logits_float64(config, checkpoint.load_weights(torch.float32, CPU), token_ids)
    # A rank's part of the inner features, 48, is no multiple of a block.
    plan = plan_weights("a16gguf", None, {r".*\.down": "none"})
    shares = [read_share(config, checkpoint.tensors, torch.float32, rank, 2, plan) for rank in range(2)]
    assert {name.rpartition(".")[2] for name in shares[1].stored} == {"qkv", "o", "gate_up", "head"}
    with ranks_of(config, shares, plan) as lead:
        got = logits_alone(lead, token_ids, [49, 1])
    assert float((got.double() - expected).norm() / expected.norm()) < 2e-5
    plan = plan_weights("a8gguf")
    share = read_share(config, checkpoint.tensors, torch.float32, 1, 2, plan)
    with pytest.raises(
        ValueError, match=r"a multiple of 32 inputs of model\.layers\.0\.mlp\.down_proj\.weight, .* leaves 48"
    ):
        share.stored["layers.0.down"].read()


def test_each_rank_has_a_file_of_packed_weights(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(ModelOptions(model="random:tiny-llama"))
    options = ModelOptions(model="random:tiny-llama", packed_cache=str(tmp_path / "packed"))
    plan = plan_weights("a8w8")
    token_ids = tokens(4, checkpoint.config, 20)

    def logits() -> tuple[torch.Tensor, bool]:
        shares = []
        for rank in range(2):
            tensors = shared(checkpoint.config, checkpoint.tensors, rank, 2)
            share = replace(checkpoint, config=share_of(checkpoint.config, 2), tensors=tensors)
            shares.append(load_packed(share, options, torch.float32, plan, NullProgress(), (rank, 2)))
        with ranks_of(checkpoint.config, shares, plan) as lead:
            return logits_alone(lead, token_ids, [20]), all(share.packed for share in shares)

    expected, were_packed = logits()
    assert not were_packed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["packed.0of2", "packed.1of2"]
    again, were_packed = logits()
    assert were_packed
    assert torch.equal(again, expected)
    # One rank's file is not another's.
    (tmp_path / "packed.0of2").replace(tmp_path / "packed.1of2")
    again, were_packed = logits()
    assert not were_packed
    assert torch.equal(again, expected)


def test_blocks_are_copied_in_every_rank() -> None:
    config = tiny_config()
    weights = tiny_weights(config, torch.float32)
    token_ids = tokens(2, config, 40)
    with ranked(config, weights, 2) as lead:
        expected = logits_alone(lead, token_ids, [39, 1])[-1]
        decoding, sequence = RankedDecoding(lead, 30), PagedSequence(token_ids)
        decoding.step([(sequence, 39)])
        copies = [BlockCopy(BlockId(block), BlockId(decoding.free.pop())) for block in sequence.blocks]
        decoding.pool.copy(copies)
        sequence.blocks = [copy.target for copy in copies]
        (last,) = decoding.step([(sequence, 1)])
    assert torch.equal(last[-1], expected)


def test_a_step_of_more_tokens_than_there_is_room_for_is_refused() -> None:
    config = tiny_config()
    with (
        ranked(config, tiny_weights(config, torch.float32), 1) as lead,
        pytest.raises(ValueError, match="batch must hold"),
    ):
        logits_alone(lead, tokens(0, config, 300), [257])


def test_a_rank_takes_the_death_of_the_first_one_for_a_hangup() -> None:
    ours, theirs = socket.socketpair()
    order = RankOrder(rank=1, num_ranks=2, memory_fd=-1, links=(theirs.detach(),), free_bytes=0)
    own, memory = SimpleNamespace(device=CPU), SimpleNamespace(order=order)
    follower = FollowingRank(cast(NativeDecoder, own), cast(RankMemory, memory))
    # What a dead process has not read makes its end of the socket a reset one: that this rank is ready, here.
    ours.close()
    assert not follower.obey()
    follower.close()


def test_a_rank_that_cannot_go_on_does_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "_END_DEADLINE_S", 0)
    config = tiny_config()
    with ranked(config, tiny_weights(config, torch.float32), 2) as lead:
        decoding = RankedDecoding(lead, 30)
        # The other rank leaves, as if it had been killed.
        lead.close()
        ours, theirs = socket.socketpair()
        theirs.close()
        lead._links = [RankLink(ours.detach())]
        with pytest.raises(RuntimeError, match="another rank is gone, and nobody has ended this one for 0 s"):
            decoding.step([(PagedSequence(tokens(0, config, 20)), 20)])


def test_ranks_that_share_a_node_divide_what_it_has_free() -> None:
    assert free_together([Ready(900, ()), Ready(800, ())]) == 800
    assert free_together([Ready(500, (0,)), Ready(400, (1,))]) == 800
    assert free_together([Ready(500, (0,)), Ready(400, (1,)), Ready(510, (0,))]) == 750


def test_the_first_rank_knows_what_is_free_when_the_others_are_ready() -> None:
    config = tiny_config()
    with ranked(config, tiny_weights(config, torch.float32), 2) as lead:
        assert 0 < lead.free_bytes <= 2 * free_memory_bytes(CPU)


def test_a_model_that_cannot_be_divided_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="tensor_parallel must divide num_kv_heads = 3 of this model, got 2"):
        check_shares(random_config("smollm2-135m"), 2)
    with pytest.raises(ValueError, match="tensor_parallel must divide intermediate_size = 99 of this model, got 2"):
        check_shares(tiny_config(intermediate_size=99), 2)
    check_shares(random_config("qwen2.5-0.5b"), 2)
    share = share_of(random_config("qwen2.5-0.5b"), 2)
    assert (share.num_heads, share.num_kv_heads, share.intermediate_size, share.head_dim) == (7, 1, 2432, 64)


def test_every_token_has_one_rank_that_computes_its_logit() -> None:
    for vocab_size, num_ranks in ((128, 2), (101, 2), (7, 3), (151_936, 4)):
        parts = [outputs_of(vocab_size, rank, num_ranks) for rank in range(num_ranks)]
        assert [token for part in parts for token in part] == list(range(vocab_size))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
