"""Rotary tables: the cosine and sine of every position and frequency, for every rope scaling of transformers 5.

A scaling stretches the positions that a model was trained on over a longer context, by changing the frequencies and
sometimes by scaling cosine and sine (the *attention factor*). Two scalings, `dynamic` and `longrope`, depend on how
long the sequence is. Here they are fixed when the model is loaded, for the longest sequence that it may serve: a
token's key would otherwise change while its sequence grows, and with it everything cached.

    H head dim     U = H / 2 frequencies     X positions of the longest context
"""

import math
from dataclasses import dataclass
from typing import TypeVar

import torch

from triode.models.config import ModelConfig, RopeConfig

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class RopeTable:
    """float32 cosines and sines, the attention factor multiplied in."""

    cos_XU: torch.Tensor
    sin_XU: torch.Tensor


def rope_table(config: ModelConfig, device: torch.device) -> RopeTable:
    """The table for positions 0 to `max_context_tokens - 1`."""
    frequency_U, factor = inverse_frequencies(config.rope, config.head_dim, config.max_context_tokens)
    angle_XU = torch.arange(config.max_context_tokens, dtype=torch.float32)[:, None] * frequency_U
    return RopeTable(angle_XU.cos().mul_(factor).to(device), angle_XU.sin().mul_(factor).to(device))


def inverse_frequencies(rope: RopeConfig, head_dim: int, max_context_tokens: int) -> tuple[torch.Tensor, float]:
    """Radians a position for each pair of dimensions, float32 [U], and the attention factor."""
    plain_U = _frequencies(rope.theta, head_dim)
    match rope.kind:
        case "default":
            return plain_U, 1.0
        case "linear":
            return plain_U / _given(rope.factor, "factor"), 1.0
        case "dynamic":
            return _dynamic(rope, head_dim, max_context_tokens), 1.0
        case "llama3":
            return _llama3(rope, plain_U), 1.0
        case "yarn":
            return _yarn(rope, head_dim, plain_U)
        case "longrope":
            return _longrope(rope, plain_U, max_context_tokens)
        case "factors":
            return plain_U / torch.tensor(_given(rope.short_factors, "short_factors")), 1.0


def _frequencies(theta: float, head_dim: int) -> torch.Tensor:
    return 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)


def _given(value: _T | None, name: str) -> _T:
    if value is None:
        raise ValueError(f"rope.{name} must be given for this kind of rope, got None")
    return value


def _dynamic(rope: RopeConfig, head_dim: int, max_context_tokens: int) -> torch.Tensor:
    """NTK-aware scaling of the base (u/bloc97 and u/emozilla), for the longest sequence."""
    original = _given(rope.original_max_position, "original_max_position")
    factor = _given(rope.factor, "factor")
    longest = max(max_context_tokens, original)
    stretch = factor * longest / original - (factor - 1)
    return _frequencies(rope.theta * stretch ** (head_dim / (head_dim - 2)), head_dim)


def _llama3(rope: RopeConfig, plain_U: torch.Tensor) -> torch.Tensor:
    """Long wavelengths are divided by the factor, short ones kept, those between blended (Llama 3.1)."""
    factor = _given(rope.factor, "factor")
    low = _given(rope.low_freq_factor, "low_freq_factor")
    high = _given(rope.high_freq_factor, "high_freq_factor")
    rotations_U = _given(rope.original_max_position, "original_max_position") * plain_U / (2 * math.pi)
    kept_U = ((rotations_U - low) / (high - low)).clamp(0, 1)
    return (1 - kept_U) * plain_U / factor + kept_U * plain_U


def _yarn(rope: RopeConfig, head_dim: int, plain_U: torch.Tensor) -> tuple[torch.Tensor, float]:
    """YaRN (Peng et al., arXiv 2309.00071): a ramp over dimensions from kept to divided frequencies."""
    factor = _given(rope.factor, "factor")
    original = _given(rope.original_max_position, "original_max_position")

    def dimension(rotations: float) -> float:
        return head_dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = high - low or 0.001
    divided_U = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
    frequency_U = plain_U / factor * divided_U + plain_U * (1 - divided_U)
    if rope.attention_factor is not None:
        return frequency_U, rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return frequency_U, _yarn_scale(factor, rope.mscale) / _yarn_scale(factor, rope.mscale_all_dim)
    return frequency_U, _yarn_scale(factor, 1.0)


def _yarn_scale(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _longrope(rope: RopeConfig, plain_U: torch.Tensor, max_context_tokens: int) -> tuple[torch.Tensor, float]:
    """LongRoPE (Ding et al., arXiv 2402.13753): searched divisors, one set for short and one for long contexts."""
    factor = _given(rope.factor, "factor")
    original = _given(rope.original_max_position, "original_max_position")
    is_long = max_context_tokens > original
    divisors = _given(rope.long_factors, "long_factors") if is_long else _given(rope.short_factors, "short_factors")
    frequency_U = plain_U / torch.tensor(divisors)
    if rope.attention_factor is not None:
        return frequency_U, rope.attention_factor
    return frequency_U, math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
