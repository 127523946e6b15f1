"""Reading memory, to be timed: what comes out is a speed that this machine can have."""

import pytest
import torch

from native_steps import native_decoder, native_library
from tiny_decoders import tiny_config, tiny_weights
from triode.models import bandwidth
from triode.models.bandwidth import read_bandwidth


def test_memory_is_read_at_a_plausible_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bandwidth, "_SECONDS", 0.01)
    monkeypatch.setattr(bandwidth, "_BUFFER_BYTES", 2**24)
    assert 1e7 < read_bandwidth(native_library(), 2) < 1e13


def test_a_step_reads_its_packed_matrices() -> None:
    config = tiny_config(hidden_size=64, intermediate_size=128, vocab_size=128, num_heads=4, num_kv_heads=2)
    numbers = (config.q_size + 2 * config.kv_size + config.q_size) * 64 + 3 * 64 * 128
    for dtype in (torch.float32, torch.bfloat16):
        decoder = native_decoder(config, tiny_weights(config, dtype))
        assert decoder.matrices_bytes == (config.num_layers * numbers + 128 * 64) * dtype.itemsize
