"""A token's logits do not depend on its neighbours, on chunking, on a prefix hit or on the threads: bit for bit."""

import random
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch

from native_steps import native_decoder
from paged_decoding import BLOCK_SIZE_TOKENS, PagedDecoding, PagedSequence
from tiny_decoders import tiny_config, tiny_decoder, tiny_weights
from triode.kernels.dispatch import choose_kernels
from triode.models.decoder import Decoder
from triode.models.program import StepProgram

NUM_TOKENS = 150


@pytest.fixture(autouse=True)
def restored_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


WINDOWED = tiny_config(sliding_window_tokens=40, sliding_layers=(True, False), qk_norm=True)
BIASED = tiny_config(qkv_bias=True)
DECODERS: dict[str, Callable[[], StepProgram]] = {
    "torch float32": lambda: tiny_decoder(BIASED, torch.float32),
    "torch bfloat16": lambda: tiny_decoder(BIASED, torch.bfloat16),
    "torch float16": lambda: tiny_decoder(BIASED, torch.float16),
    "torch window": lambda: tiny_decoder(WINDOWED),
    "native float32": lambda: native_decoder(BIASED, tiny_weights(BIASED, torch.float32)),
    "native bfloat16": lambda: native_decoder(BIASED, tiny_weights(BIASED, torch.bfloat16)),
    "native window": lambda: native_decoder(WINDOWED, tiny_weights(WINDOWED, torch.bfloat16)),
}


@pytest.fixture(scope="module", params=DECODERS)
def decoder(request: pytest.FixtureRequest) -> StepProgram:
    return DECODERS[request.param]()


def tokens(seed: int, count: int = NUM_TOKENS) -> list[int]:
    return random.Random(seed).choices(range(128), k=count)


def logits_alone(decoder: StepProgram, chunks: list[int]) -> torch.Tensor:
    decoding = PagedDecoding(decoder, num_blocks=20, seed=len(chunks))
    sequence = PagedSequence(tokens(0))
    return torch.cat([decoding.step([(sequence, count)])[0] for count in chunks])


@pytest.fixture(scope="module")
def expected(decoder: StepProgram) -> torch.Tensor:
    return logits_alone(decoder, [NUM_TOKENS])


@pytest.mark.parametrize(
    "chunks",
    [[75, 75], [1, 149], [149, 1], [64, 64, 22], [7] * 21 + [3], [100] + [1] * 50, [3, 66, 2, 79]],
    ids=lambda chunks: f"{len(chunks)} from {chunks[0]}",
)
def test_chunks_do_not_change_logits(decoder: StepProgram, expected: torch.Tensor, chunks: list[int]) -> None:
    assert torch.equal(logits_alone(decoder, chunks), expected)


@pytest.mark.parametrize("num_neighbours", [1, 3, 32])
def test_neighbours_do_not_change_logits(decoder: StepProgram, expected: torch.Tensor, num_neighbours: int) -> None:
    rng = random.Random(num_neighbours)
    decoding = PagedDecoding(decoder, num_blocks=800)
    ours = PagedSequence(tokens(0))
    neighbours = [PagedSequence(tokens(seed, rng.randrange(20, 300))) for seed in range(1, num_neighbours + 1)]
    outputs = []
    while ours.num_computed < NUM_TOKENS:
        rows = [(ours, min(rng.choice((1, 5, 30)), NUM_TOKENS - ours.num_computed))]
        for neighbour in neighbours:
            if left := len(neighbour.token_ids) - neighbour.num_computed:
                rows.insert(rng.randrange(len(rows) + 1), (neighbour, min(left, rng.choice((1, 1, 1, 40)))))
        place = next(row for row, (sequence, _) in enumerate(rows) if sequence is ours)
        outputs.append(decoding.step(rows)[place])
    assert torch.equal(torch.cat(outputs), expected)


@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_threads_do_not_change_logits(decoder: StepProgram, expected: torch.Tensor, num_threads: int) -> None:
    torch.set_num_threads(num_threads)
    assert torch.equal(logits_alone(decoder, [97, 53]), expected)


def test_a_prefix_hit_does_not_change_logits(decoder: StepProgram, expected: torch.Tensor) -> None:
    """Another sequence computed the first blocks, one token at a time; ours begins after them."""
    decoding = PagedDecoding(decoder, num_blocks=30)
    first = PagedSequence(tokens(0)[: 4 * BLOCK_SIZE_TOKENS] + tokens(5, 30))
    for _ in first.token_ids:
        decoding.step([(first, 1)])
    ours = PagedSequence(tokens(0), blocks=first.blocks[:4], num_computed=4 * BLOCK_SIZE_TOKENS)
    output = decoding.step([(ours, NUM_TOKENS - ours.num_computed)])[0]
    assert torch.equal(output, expected[4 * BLOCK_SIZE_TOKENS :])


def test_recomputing_into_used_blocks_does_not_change_logits(decoder: StepProgram, expected: torch.Tensor) -> None:
    decoding = PagedDecoding(decoder, num_blocks=12)
    for seed in (3, 0):
        sequence = PagedSequence(tokens(seed))
        output = decoding.step([(sequence, NUM_TOKENS)])[0]
        decoding.release(sequence)
    assert torch.equal(output, expected)


def test_the_check_would_see_a_neighbour() -> None:
    """One last bit of the norms that depends on how many rows there are, as torch's own products do on some processors."""
    kernels = choose_kernels(torch.device("cpu"), torch.float32)

    def norm_of_rows(x_TD: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
        normed_TD = kernels.rms_norm(x_TD, weight_D, eps)
        return normed_TD if len(x_TD) < NUM_TOKENS else normed_TD.nextafter(torch.tensor(torch.inf))

    weights = tiny_weights(BIASED, torch.float32)
    decoder = Decoder(BIASED, weights, replace(kernels, rms_norm=norm_of_rows))
    assert not torch.equal(logits_alone(decoder, [75, 75]), logits_alone(decoder, [NUM_TOKENS]))
