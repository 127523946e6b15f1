"""The compiled step over its cache: keys and values as int8, and contexts of several segments."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from exact_decoder import Stored, logits_float64
from native_steps import ISAS, native_decoder
from paged_decoding import BLOCK_SIZE_TOKENS, PagedDecoding, PagedSequence
from tiny_decoders import tiny_config, tiny_weights
from triode.cache.config import CacheConfig
from triode.models.build import build_runner
from triode.models.config import ModelConfig
from triode.models.program import StepProgram

CONFIGS = {
    "llama": tiny_config(),
    "window and norms": tiny_config(sliding_window_tokens=40, sliding_layers=(True, False), qk_norm=True),
    "ragged": tiny_config(hidden_size=70, intermediate_size=83, vocab_size=101, head_dim=18, qkv_bias=True),
    "wide heads": tiny_config(head_dim=136, num_heads=2, num_kv_heads=2),
}
KV_DTYPES = {"as computed": None, "int8": torch.int8}
SHORT, LONG = 135, 1200
"""Tokens in one segment of 512 positions, and in three."""


def tokens(config: ModelConfig, count: int) -> list[int]:
    return torch.randint(config.vocab_size, (count,), generator=torch.Generator().manual_seed(count)).tolist()


def run(
    decoder: StepProgram, token_ids: Sequence[int], chunks: Sequence[int], kv_dtype: torch.dtype | None
) -> tuple[torch.Tensor, PagedDecoding, PagedSequence]:
    """Logits of one sequence alone, and where it lies."""
    decoding = PagedDecoding(decoder, num_blocks=len(token_ids) // BLOCK_SIZE_TOKENS + 9, seed=1, kv_dtype=kv_dtype)
    sequence = PagedSequence(list(token_ids))
    return torch.cat([decoding.step([(sequence, count)])[0] for count in chunks]), decoding, sequence


UNIT = 16
"""Positions whose numbers lie together (kernels/native/kv.h)."""


def heads_in_cache(
    cache_PBKE: torch.Tensor, sequence: PagedSequence, head_dim: int, *, are_keys: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """A sequence's int8 numbers, widened, and their scales: [K, T, H] and [K, T, 1]."""
    num_heads, elements = cache_PBKE.shape[2:]
    units_UKX = cache_PBKE[sequence.blocks].reshape(-1, num_heads, UNIT * elements)
    bytes_UKX, scales_UKX = units_UKX[..., : -4 * UNIT], units_UKX[..., -4 * UNIT :]
    if are_keys:
        # Words of four bytes, [words][positions].
        bytes_UKX = bytes_UKX.unflatten(-1, (-1, UNIT, 4)).transpose(2, 3)
    numbers_KTH = bytes_UKX.reshape(-1, num_heads, UNIT, elements - 4).transpose(0, 1).flatten(1, 2)
    scale_KT = torch.from_numpy(scales_UKX.transpose(0, 1).contiguous().numpy().view(np.float32)).flatten(1, 2)
    num_tokens = sequence.num_computed
    return numbers_KTH[:, :num_tokens, :head_dim].double(), scale_KT[:, :num_tokens, None].double()


def checked(decoding: PagedDecoding, sequence: PagedSequence) -> Stored:
    """What the cache holds, once it is known to be the nearest to what it should."""

    def dequantized(cache_PBKE: torch.Tensor, exact: torch.Tensor, *, are_keys: bool) -> torch.Tensor:
        numbers, scale = heads_in_cache(cache_PBKE, sequence, exact.shape[-1], are_keys=are_keys)
        torch.testing.assert_close(scale, exact.abs().amax(-1, keepdim=True) / 127, rtol=1e-4, atol=0)
        assert ((numbers * scale - exact).abs() <= scale * (0.5 + 1e-2)).all()
        return numbers * scale

    return lambda layer, keys, values: (
        dequantized(decoding.keys[layer], keys, are_keys=True),
        dequantized(decoding.values[layer], values, are_keys=False),
    )


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", CONFIGS)
def test_int8_keys_and_values_are_the_nearest_and_computed_with_exactly(name: str, isa: str) -> None:
    config = CONFIGS[name]
    weights = tiny_weights(config, torch.float32)
    token_ids = tokens(config, SHORT)
    got, decoding, sequence = run(native_decoder(config, weights, isa), token_ids, [100, 35], torch.int8)
    expected = logits_float64(config, weights, token_ids, checked(decoding, sequence))
    assert (got.double() - expected).norm() < 2e-6 * expected.norm()


def test_a_long_context_has_the_logits_of_float64() -> None:
    config = CONFIGS["window and norms"]
    weights = tiny_weights(config, torch.float32)
    token_ids = tokens(config, LONG)
    got, _, _ = run(native_decoder(config, weights), token_ids, [1000, *[1] * 200], None)
    expected = logits_float64(config, weights, token_ids)
    assert (got.double() - expected).norm() < 2e-6 * expected.norm()


@pytest.mark.parametrize("kv_dtype", KV_DTYPES.values(), ids=list(KV_DTYPES))
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sharing_a_long_context_changes_no_bit(dtype: torch.dtype, isa: str, kv_dtype: torch.dtype | None) -> None:
    """Whole, in chunks that end anywhere, and decoded by one, two or three threads that take its segments apart."""
    config = tiny_config(sliding_window_tokens=700, sliding_layers=(True, False))
    decoder = native_decoder(config, tiny_weights(config, dtype), isa)
    token_ids = tokens(config, LONG)
    expected, _, _ = run(decoder, token_ids, [LONG], kv_dtype)
    assert expected.isfinite().all()
    before = torch.get_num_threads()
    for num_threads, chunks in ((1, [1190] + [1] * 10), (2, [509] + [1] * 8 + [683]), (3, [1023] + [1] * 4 + [173])):
        torch.set_num_threads(num_threads)
        assert torch.equal(run(decoder, token_ids, chunks, kv_dtype)[0], expected)
    torch.set_num_threads(before)


@pytest.mark.parametrize("kv_dtype", KV_DTYPES.values(), ids=list(KV_DTYPES))
def test_long_and_short_neighbours_change_no_bit(kv_dtype: torch.dtype | None) -> None:
    config = tiny_config()
    decoder = native_decoder(config, tiny_weights(config, torch.bfloat16))
    lengths = (3, 515, 40, 1100, 1024)
    alone = [run(decoder, tokens(config, length + 3), [length, 1, 1, 1], kv_dtype)[0][-3:] for length in lengths]
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    decoding = PagedDecoding(decoder, num_blocks=220, kv_dtype=kv_dtype)
    sequences = [PagedSequence(tokens(config, length + 3)) for length in lengths]
    for sequence, length in zip(sequences, lengths, strict=True):
        decoding.step([(sequence, length)])
    steps = [decoding.step([(sequence, 1) for sequence in sequences]) for _ in range(3)]
    for expected, *got in zip(alone, *steps, strict=True):
        assert torch.equal(torch.cat(got), expected)
    torch.set_num_threads(before)


def test_a_token_of_nan_spoils_no_other_sequence_in_int8() -> None:
    config = tiny_config()
    weights = tiny_weights(config, torch.float32)
    weights.embed_VD[7] = torch.nan
    decoder = native_decoder(config, weights)
    ours = [token for token in tokens(config, SHORT) if token != 7]
    expected, _, _ = run(decoder, ours, [len(ours)], torch.int8)
    decoding = PagedDecoding(decoder, num_blocks=40, kv_dtype=torch.int8)
    poisoned, got = decoding.step([(PagedSequence([5, 7, *ours]), len(ours) + 2), (PagedSequence(ours), len(ours))])
    assert poisoned[1:].isnan().all()
    assert torch.equal(got, expected)


def test_int8_gives_nearly_twice_the_blocks() -> None:
    config = tiny_config(head_dim=64)
    weights = tiny_weights(config, torch.bfloat16)
    blocks = [
        build_runner(config, weights, cache_config=cache_config, max_running=64).num_blocks
        for cache_config in (CacheConfig(kv_cache_bytes=2**20), CacheConfig(kv_cache_bytes=2**20, kv_dtype="int8"))
    ]
    assert blocks == [2**20 // (2 * 2 * 16 * 2 * 64 * 2), 2**20 // (2 * 2 * 16 * 2 * (64 + 4))]


def test_int8_is_refused_where_torch_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    config, int8 = tiny_config(), CacheConfig(kv_dtype="int8", kv_cache_bytes=2**20)
    weights = tiny_weights(config, torch.float32)
    with pytest.raises(ValueError, match=r"kv_dtype must be auto here, got 'int8': the torch kernels were asked for"):
        build_runner(config, weights, cache_config=int8, max_running=4, kernels="reference")
    monkeypatch.setenv("CXX", "no-such-compiler-anywhere")
    with pytest.raises(ValueError, match=r"kv_dtype must be auto here, got 'int8': no C\+\+ compiler"):
        build_runner(config, weights, cache_config=int8, max_running=4)
    with pytest.raises(ValueError, match="kv_dtype must be auto or int8, got 'int4'"):
        CacheConfig(kv_dtype="int4")  # type: ignore[arg-type]
