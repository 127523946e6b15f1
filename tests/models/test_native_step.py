"""The compiled step against float64, against the torch kernels, and against itself."""

import math
import random
from dataclasses import replace

import pytest
import torch

from exact_decoder import logits_float64
from native_steps import ISAS, native_decoder, native_library
from paged_decoding import PagedDecoding, PagedSequence
from tiny_decoders import tiny_config, tiny_decoder, tiny_weights
from triode.kernels.sample.reference import IMPOSSIBLE, greedy
from triode.models.batch import build_batch
from triode.models.config import ModelConfig
from triode.models.decoder import Decoder
from triode.models.native import NativeDecoder
from triode.models.program import StepProgram
from triode.models.quantization import Quantization
from triode.models.weights import DecoderWeights, LayerWeights

# Those with VNNI differ in products of bytes alone (tests/kernels/native/test_native_formats.py).
STEP_ISAS = [isa for isa in ISAS if not isa.endswith("_vnni")]
CONFIGS = {
    "llama": tiny_config(),
    "window and norms": tiny_config(sliding_window_tokens=40, sliding_layers=(True, False), qk_norm=True),
    "ragged": tiny_config(hidden_size=70, intermediate_size=83, vocab_size=101, head_dim=18, qkv_bias=True),
    "narrow": tiny_config(hidden_size=24, intermediate_size=40, vocab_size=33, num_heads=2, num_kv_heads=1, head_dim=2),
    "wide heads": tiny_config(head_dim=136, num_heads=2, num_kv_heads=2),
    "many queries a head": tiny_config(num_heads=70, num_kv_heads=1, head_dim=4),
    "one more than a vector": tiny_config(hidden_size=65, intermediate_size=129, head_dim=34),
    "biases": tiny_config(qkv_bias=True, o_bias=True, mlp_bias=True, intermediate_size=88),
}
NUM_TOKENS = 135


def tokens(seed: int, config: ModelConfig, count: int = NUM_TOKENS) -> list[int]:
    return random.Random(seed).choices(range(config.vocab_size), k=count)


def weights_of(config: ModelConfig, dtype: torch.dtype) -> DecoderWeights:
    weights = tiny_weights(config, dtype)
    return replace(weights, layers=tuple(with_biases(layer, config) for layer in weights.layers))


def with_biases(layer: LayerWeights, config: ModelConfig) -> LayerWeights:
    generator = torch.Generator().manual_seed(1)

    def bias(weight: torch.Tensor) -> torch.Tensor:
        return torch.randn(len(weight), generator=generator).to(weight.dtype)

    return replace(
        layer,
        o_bias_D=bias(layer.o_DE) if config.o_bias else None,
        gate_up_bias_F=bias(layer.gate_up_FD) if config.mlp_bias else None,
        down_bias_D=bias(layer.down_DF) if config.mlp_bias else None,
    )


def logits_alone(decoder: StepProgram, token_ids: list[int], chunks: list[int]) -> torch.Tensor:
    decoding = PagedDecoding(decoder, num_blocks=30, seed=len(chunks))
    sequence = PagedSequence(list(token_ids))
    return torch.cat([decoding.step([(sequence, count)])[0] for count in chunks])


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("isa", STEP_ISAS)
@pytest.mark.parametrize("name", CONFIGS)
def test_float32_logits_are_those_of_float64(name: str, isa: str) -> None:
    config = CONFIGS[name]
    weights = weights_of(config, torch.float32)
    token_ids = tokens(0, config)
    got = logits_alone(native_decoder(config, weights, isa), token_ids, [100, 35])
    assert relative_error(got, logits_float64(config, weights, token_ids)) < 2e-6


@pytest.mark.parametrize("isa", STEP_ISAS)
@pytest.mark.parametrize("name", CONFIGS)
def test_bfloat16_logits_are_as_near_to_float64_as_those_of_torch(name: str, isa: str) -> None:
    config = CONFIGS[name]
    weights = weights_of(config, torch.bfloat16)
    token_ids = tokens(0, config)
    expected = logits_float64(config, weights, token_ids)
    native = relative_error(logits_alone(native_decoder(config, weights, isa), token_ids, [100, 35]), expected)
    by_torch = Decoder(config, weights, tiny_decoder(config, torch.bfloat16).kernels)
    assert native < 1.2 * relative_error(logits_alone(by_torch, token_ids, [100, 35]), expected)


def rounded_to_int8(weight: torch.Tensor) -> torch.Tensor:
    scale = weight.double().abs().amax(1, keepdim=True) / 127
    return (weight.double() / scale).round() * scale


@pytest.mark.parametrize("isa", STEP_ISAS)
@pytest.mark.parametrize("name", CONFIGS)
def test_int8_weights_are_the_nearest_and_computed_with_exactly(name: str, isa: str) -> None:
    config = CONFIGS[name]
    weights = weights_of(config, torch.float32)
    expected = replace(
        weights,
        layers=tuple(
            replace(
                layer,
                **{
                    field: rounded_to_int8(getattr(layer, field))
                    for field in ("qkv_ED", "o_DE", "gate_up_FD", "down_DF")
                },
            )
            for layer in weights.layers
        ),
        head_VD=rounded_to_int8(weights.head_VD),
    )
    token_ids = tokens(0, config)
    before = weights.layers[0].qkv_ED.clone()
    got = logits_alone(native_decoder(config, weights, isa, "a16w8"), token_ids, [100, 35])
    assert relative_error(got, logits_float64(config, expected, token_ids)) < 3e-6
    assert torch.equal(weights.layers[0].qkv_ED, before)


@pytest.mark.parametrize("isa", STEP_ISAS)
@pytest.mark.parametrize("quantization", ["none", "a16w8", "a8w8", "a8w4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["window and norms", "ragged"])
def test_chunks_neighbours_and_threads_change_no_bit(
    name: str, dtype: torch.dtype, quantization: Quantization, isa: str
) -> None:
    config = CONFIGS[name]
    decoder = native_decoder(config, weights_of(config, dtype), isa, quantization)
    token_ids = tokens(0, config)
    expected = logits_alone(decoder, token_ids, [NUM_TOKENS])
    for chunks in ([1, 134], [64, 64, 7], [5] * 27, [80] + [1] * 55):
        assert torch.equal(logits_alone(decoder, token_ids, chunks), expected)
    before = torch.get_num_threads()
    for num_threads in (1, 2, 3):
        torch.set_num_threads(num_threads)
        assert torch.equal(among_neighbours(decoder, token_ids, 20, num_threads), expected)
    torch.set_num_threads(before)


def among_neighbours(decoder: StepProgram, token_ids: list[int], num_neighbours: int, seed: int) -> torch.Tensor:
    rng = random.Random(seed)
    decoding = PagedDecoding(decoder, num_blocks=400)
    ours = PagedSequence(list(token_ids))
    others = [PagedSequence(tokens(n, decoder.config, rng.randrange(20, 200))) for n in range(num_neighbours)]
    outputs = []
    while left := len(token_ids) - ours.num_computed:
        rows = [(ours, min(rng.choice((1, 5, 30)), left))]
        for other in others:
            if room := len(other.token_ids) - other.num_computed:
                rows.insert(rng.randrange(len(rows) + 1), (other, min(room, rng.choice((1, 1, 40)))))
        place = next(row for row, (sequence, _) in enumerate(rows) if sequence is ours)
        outputs.append(decoding.step(rows)[place])
    return torch.cat(outputs)


def test_a_row_of_nan_stays_alone() -> None:
    config = CONFIGS["ragged"]
    weights = weights_of(config, torch.bfloat16)
    weights.embed_VD[7] = torch.nan
    decoder = native_decoder(config, weights)
    ours = [token for token in tokens(0, config) if token != 7]
    expected = logits_alone(decoder, ours, [len(ours)])
    decoding = PagedDecoding(decoder, num_blocks=40)
    broken, healthy = PagedSequence([7] * len(ours)), PagedSequence(ours)
    poisoned, got = decoding.step([(broken, len(ours)), (healthy, len(ours))])
    assert poisoned.isnan().all()
    assert torch.equal(got, expected)
    again = PagedDecoding(decoder, num_blocks=40)
    assert torch.equal(again.step([(PagedSequence(ours), len(ours))])[0], expected)


@pytest.mark.parametrize("isa", STEP_ISAS)
def test_huge_numbers_are_computed_with(isa: str) -> None:
    """A residual stream near 1e17, scores in the hundreds and gates beyond what exp can hold."""
    config = tiny_config()
    weights = tiny_weights(config, torch.float32)
    weights.embed_VD.mul_(1e17)
    for layer in weights.layers:
        layer.qkv_ED[: config.q_size].mul_(50)
        layer.gate_up_FD[: config.intermediate_size].mul_(500)
        layer.down_DF.mul_(1e13)
    token_ids = tokens(3, config, 70)
    got = logits_alone(native_decoder(config, weights, isa), token_ids, [70])
    expected = logits_float64(config, weights, token_ids)
    assert math.isfinite(float(expected.norm()))
    assert relative_error(got, expected) < 1e-4


def test_a_step_uses_no_number_that_it_did_not_write() -> None:
    """Steps of other shapes, full of NaN, leave their remains in the working memory."""
    config = CONFIGS["ragged"]
    weights = weights_of(config, torch.float32)
    weights.embed_VD[7] = torch.nan
    decoder = native_decoder(config, weights)
    ours = [token for token in tokens(0, config) if token != 7]
    expected = logits_alone(native_decoder(config, weights), ours, [len(ours)])
    for length in (300, 3, 64):
        logits_alone(decoder, [7] * length, [length])
        assert torch.equal(logits_alone(decoder, ours, [len(ours)]), expected)


BAD_BATCHES = {
    "a token beyond the vocabulary": ("token_ids_T", 128),
    "a negative token": ("token_ids_T", -1),
    "a position beyond the context": ("positions_PT", 2048),
    "a slot beyond the cache": ("slot_T", 160),
    "a negative slot": ("slot_T", -16),
    "a block beyond the cache": ("block_table_RC", 10),
    "a negative block": ("block_table_RC", -1),
    "a start beyond the table": ("start_R", 10_000),
    "a negative start": ("start_R", -1),
    "rows that do not cover the tokens": ("query_start_R1", 3),
}


@pytest.mark.parametrize("name", BAD_BATCHES)
def test_an_index_out_of_bounds_is_refused_before_anything_is_computed(name: str) -> None:
    field, value = BAD_BATCHES[name]
    config = tiny_config()
    decoder = native_decoder(config, tiny_weights(config, torch.float32))
    batch = build_batch(
        torch.arange(20).numpy(),
        torch.tensor([0]).numpy(),
        torch.tensor([20]).numpy(),
        torch.tensor([[3, 5]]).numpy(),
        block_size_tokens=16,
        row_multiple=1,
        device=torch.device("cpu"),
    )
    holder = batch if hasattr(batch, field) else batch.rows
    getattr(holder, field)[..., -1] = value
    cache = [torch.zeros(10, 16, config.num_kv_heads, config.head_dim) for _ in range(4)]
    with pytest.raises(ValueError, match="blocks that exist"):
        decoder.forward(batch, cache[:2], cache[2:])
    assert not any(tensor.any() for tensor in cache)


@pytest.mark.parametrize("isa", STEP_ISAS)
@pytest.mark.parametrize("num_rows", [1, 5, 40])
def test_the_likeliest_token_is_the_first_of_the_largest_logits(num_rows: int, isa: str) -> None:
    config = CONFIGS["ragged"]
    weights = weights_of(config, torch.bfloat16)
    # Tokens with equal logits, in one panel and in two.
    weights.head_VD[[3, 70, 100]] = weights.head_VD[[60, 60, 60]]
    decoder = native_decoder(config, weights, isa)
    hidden_RD = torch.randn(num_rows, config.hidden_size, generator=torch.Generator().manual_seed(2)).bfloat16()
    hidden_RD[0] = 4 * weights.head_VD[60]
    before = torch.get_num_threads()
    for num_threads in (1, 3):
        torch.set_num_threads(num_threads)
        assert torch.equal(decoder.likeliest(hidden_RD), greedy(decoder.logits(hidden_RD)))
    torch.set_num_threads(before)
    assert int(decoder.likeliest(hidden_RD)[0]) == 3


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_rows_without_a_finite_logit_have_no_likeliest_token(poison: float) -> None:
    config = CONFIGS["ragged"]
    decoder = native_decoder(config, weights_of(config, torch.float32))
    hidden_RD = torch.randn(4, config.hidden_size, generator=torch.Generator().manual_seed(3))
    hidden_RD[2, 5] = poison
    token_R = decoder.likeliest(hidden_RD)
    assert token_R.tolist() == greedy(decoder.logits(hidden_RD)).tolist()
    assert (token_R == IMPOSSIBLE).tolist() == [False, False, True, False]


def test_blocks_that_units_do_not_fill_are_refused() -> None:
    config = tiny_config()
    decoder = native_decoder(config, tiny_weights(config, torch.float32))
    batch = build_batch(
        torch.arange(5).numpy(),
        torch.tensor([0]).numpy(),
        torch.tensor([5]).numpy(),
        torch.tensor([[3]]).numpy(),
        block_size_tokens=24,
        row_multiple=1,
        device=torch.device("cpu"),
    )
    cache = [torch.zeros(10, 24, config.num_kv_heads, config.head_dim) for _ in range(4)]
    with pytest.raises(ValueError, match="blocks that exist"):
        decoder.forward(batch, cache[:2], cache[2:])


def test_float16_is_refused() -> None:
    config = tiny_config()
    with pytest.raises(ValueError, match=r"float32 or bfloat16 for native kernels, got torch\.float16"):
        NativeDecoder(config, tiny_weights(config, torch.float16), native_library())
