"""Behind the last layer's cache a step computes wanted tokens alone, with the bits that they have among all."""

from dataclasses import replace
from random import Random

import numpy as np
import pytest
import torch

from native_steps import EMULATES, ISAS, native_decoder
from paged_decoding import PagedDecoding, PagedSequence
from ranked_decoders import RankedDecoding, ranked
from tiny_decoders import tiny_config, tiny_decoder, tiny_weights
from triode.kernels.dispatch import choose_kernels
from triode.kernels.linear.reference import AddingLinear, PreparedLinear
from triode.kernels.threads import cpu_threads
from triode.models.batch import build_batch
from triode.models.config import ModelConfig
from triode.models.decoder import Decoder
from triode.models.program import StepProgram
from triode.models.quantization import Quantization

CPU = torch.device("cpu")
# Those with VNNI differ in products of bytes alone.
STEP_ISAS = [isa for isa in ISAS if not isa.endswith("_vnni")]
LENGTHS = (150, 67, 20, 9)
CONFIGS = {
    "llama": tiny_config(),
    "a window at the end": tiny_config(sliding_window_tokens=40, sliding_layers=(False, True), qk_norm=True),
    "a window before": tiny_config(sliding_window_tokens=40, sliding_layers=(True, False), qk_norm=True),
    "ragged": tiny_config(hidden_size=70, intermediate_size=83, vocab_size=101, head_dim=18, qkv_bias=True),
    "one layer": tiny_config(num_layers=1),
}


def tokens(seed: int, config: ModelConfig) -> list[int]:
    return Random(seed).choices(range(config.vocab_size), k=LENGTHS[seed])


def expect_the_bits_of_all(decoding: PagedDecoding, expected: list[torch.Tensor], seed: int) -> None:
    """Sequences in random chunks and company, of each of which some of the last tokens are wanted, or none, or all."""
    rng, config = Random(seed), decoding.decoder.config
    sequences = [PagedSequence(tokens(number, config)) for number in range(len(expected))]
    while left := [number for number, s in enumerate(sequences) if s.num_computed < len(s.token_ids)]:
        rng.shuffle(left)
        firsts = [sequences[number].num_computed for number in left]
        counts = [
            min(rng.choice((1, 1, 5, 30, 70)), len(sequences[number].token_ids) - first)
            for number, first in zip(left, firsts, strict=True)
        ]
        wanted = [min(count, rng.choice((0, 0, 1, 1, 4, 100))) for count in counts]
        rows = [(sequences[number], count) for number, count in zip(left, counts, strict=True)]
        got = decoding.step(rows, wanted)
        for number, first, count, num, some in zip(left, firsts, counts, wanted, got, strict=True):
            assert torch.equal(some, expected[number][first + count - num : first + count])


def logits_of_all(decoding: PagedDecoding, num_sequences: int = len(LENGTHS)) -> list[torch.Tensor]:
    """Of each sequence's tokens, all wanted, in one step for itself."""
    config = decoding.decoder.config
    sequences = [PagedSequence(tokens(number, config)) for number in range(num_sequences)]
    return [decoding.step([(sequence, len(sequence.token_ids))])[0] for sequence in sequences]


def check(decoder: StepProgram, kv_dtype: torch.dtype | None = None, num_storms: int = 2) -> None:
    expected = logits_of_all(PagedDecoding(decoder, 40, kv_dtype=kv_dtype))
    assert all(logits.isfinite().all() for logits in expected)
    for seed in range(num_storms):
        expect_the_bits_of_all(PagedDecoding(decoder, 40, seed, kv_dtype), expected, seed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_torch_gives_wanted_tokens_the_bits_that_they_have_among_all(name: str, dtype: torch.dtype) -> None:
    check(tiny_decoder(CONFIGS[name], dtype))


@pytest.mark.parametrize("isa", STEP_ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_the_compiled_step_does(name: str, dtype: torch.dtype, isa: str) -> None:
    check(native_decoder(CONFIGS[name], tiny_weights(CONFIGS[name], dtype), isa))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kv_dtype", [None, torch.int8], ids=str)
@pytest.mark.parametrize("quantization", ["a16w8", "a8w8", "a16w4", "a8w4"])
def test_the_compiled_step_does_in_every_format(
    quantization: Quantization, kv_dtype: torch.dtype | None, isa: str
) -> None:
    config = CONFIGS["ragged"]
    check(native_decoder(config, tiny_weights(config, torch.bfloat16), isa, quantization), kv_dtype, num_storms=1)


# Of 112 features, three threads do not move equal parts.
@pytest.mark.parametrize("hidden_size", [64, 112])
@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_threads_share_what_is_wanted(num_threads: int, hidden_size: int) -> None:
    config = tiny_config(hidden_size=hidden_size)
    with cpu_threads(num_threads):
        check(native_decoder(config, tiny_weights(config, torch.float32)))


@pytest.mark.parametrize("num_threads", [1, 3])
@pytest.mark.parametrize("is_native", [False, True])
def test_nearly_all_tokens_behind_a_few_that_nobody_wants_have_their_bits(is_native: bool, num_threads: int) -> None:
    config = CONFIGS["ragged"]
    weights = tiny_weights(config, torch.float32)
    with cpu_threads(num_threads):
        decoder = native_decoder(config, weights) if is_native else tiny_decoder(config)
        expected = logits_of_all(PagedDecoding(decoder, 40))
        rows = [(PagedSequence(tokens(number, config)), LENGTHS[number]) for number in (3, 0, 1)]
        got = PagedDecoding(decoder, 40).step(rows, [0, LENGTHS[0], LENGTHS[1] - 1])
    assert torch.equal(got[1], expected[0])
    assert torch.equal(got[2], expected[1][1:])


@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("quantization", ["none", "a8w8"])
def test_all_ranks_compute_what_is_wanted(quantization: Quantization, num_layers: int) -> None:
    config = tiny_config(num_layers=num_layers)
    with ranked(config, tiny_weights(config, torch.bfloat16), 2, quantization) as lead:
        expected = logits_of_all(RankedDecoding(lead, 60))
        for seed in range(2):
            expect_the_bits_of_all(RankedDecoding(lead, 60), expected, seed)


@pytest.mark.parametrize("is_native", [False, True])
def test_what_nobody_wants_is_in_the_cache_as_ever(is_native: bool) -> None:
    config = CONFIGS["a window at the end"]
    weights = tiny_weights(config, torch.float32)
    decoder = native_decoder(config, weights) if is_native else tiny_decoder(config)
    caches = []
    for wanted in (None, [0, 0]):
        decoding = PagedDecoding(decoder, 20)
        rows = [(PagedSequence(tokens(number, config)), LENGTHS[number]) for number in (1, 2)]
        decoding.step(rows, wanted)
        caches.append(torch.stack([*decoding.keys, *decoding.values]))
    expected, got = caches
    assert torch.equal(got.isnan(), expected.isnan())
    assert torch.equal(got.nan_to_num(7.0), expected.nan_to_num(7.0))


def test_torch_multiplies_no_more_rows_behind_the_last_cache_than_are_wanted() -> None:
    kernels = choose_kernels(CPU, torch.float32)
    seen: list[int] = []

    def prepare_gated(weight: torch.Tensor, bias: torch.Tensor | None) -> PreparedLinear:
        product = kernels.prepare_gated(weight, bias)

        def counted(x_TD: torch.Tensor) -> torch.Tensor:
            seen.append(len(x_TD))
            return product(x_TD)

        return counted

    def prepare_adding(weight: torch.Tensor, bias: torch.Tensor | None) -> AddingLinear:
        product = kernels.prepare_adding(weight, bias)

        def counted(x_TD: torch.Tensor, residual_TD: torch.Tensor) -> torch.Tensor:
            seen.append(len(x_TD))
            return product(x_TD, residual_TD)

        return counted

    config = tiny_config()
    counting = replace(kernels, prepare_gated=prepare_gated, prepare_adding=prepare_adding)
    decoding = PagedDecoding(Decoder(config, tiny_weights(config, torch.float32), counting), 40)
    first, second = PagedSequence(tokens(0, config)), PagedSequence(tokens(1, config))
    decoding.step([(first, 30), (second, 50)], [1, 4])
    assert seen == [80] * 3 + [8] * 3
    seen.clear()
    decoding.step([(first, 30), (second, 17)], [0, 0])
    assert seen == [48] * 3


@pytest.mark.skipif(EMULATES, reason="the emulated machine works in memory of its own")
@pytest.mark.parametrize(("wanted", "num_wanted"), [([1, 4], 5), ([0, 0], 0), ([0, 50], 50)])
def test_the_compiled_step_works_for_no_more_rows_behind_the_last_cache_than_are_wanted(
    wanted: list[int], num_wanted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Of one layer, so that no other has written where the last one works.
    config = CONFIGS["one layer"]

    def num_words_written(wanted: list[int] | None) -> int:
        """To the memory that a step works in, which is full of bytes 0xFF: no number that is computed here."""
        decoder = native_decoder(config, tiny_weights(config, torch.float32))
        with cpu_threads(1):
            # The step alone: logits are computed in the same memory.
            monkeypatch.setattr(decoder, "logits", lambda hidden_RD: hidden_RD)
            rows = [(PagedSequence(tokens(0, config)), 30), (PagedSequence(tokens(1, config)), 50)]
            PagedDecoding(decoder, 40).step(rows, wanted)
        memory = decoder._scratch
        return int(memory[: len(memory) // 4 * 4].view(torch.int32).ne(-1).sum())

    # What attention gives, and what the gated product does.
    a_row = config.num_heads * config.head_dim + config.intermediate_size
    assert num_words_written(None) - num_words_written(wanted) >= (80 - num_wanted) * a_row


def test_a_batch_says_where_wanted_tokens_are() -> None:
    def wanted_start(num_wanted_R: list[int] | None) -> list[int]:
        batch = build_batch(
            np.arange(9),
            np.array([0, 3, 0]),
            np.array([3, 1, 5]),
            np.array([[1], [2], [3]]),
            block_size_tokens=16,
            row_multiple=4,
            device=CPU,
            num_wanted_R=None if num_wanted_R is None else np.array(num_wanted_R),
        )
        assert batch.num_wanted == batch.wanted_start_R1[-1]
        found: list[int] = batch.wanted_start_R1.tolist()
        return found

    assert wanted_start(None) == wanted_start([3, 1, 5]) == [0, 3, 4, 9]
    assert wanted_start([1, 0, 2]) == [0, 1, 1, 3]
    assert wanted_start([0, 0, 0]) == [0, 0, 0, 0]
