"""Small random decoders without files: every family's switches at once, cheap enough for one test each."""

import torch

from triode.kernels.dispatch import choose_kernels
from triode.models.config import ModelConfig, RopeConfig
from triode.models.decoder import Decoder
from triode.models.weights import DecoderWeights, LayerWeights


def tiny_config(**changes: object) -> ModelConfig:
    """Two layers, hidden 64, 6 query and 2 KV heads of 16."""
    fields: dict[str, object] = {
        "architecture": "llama",
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_layers": 2,
        "num_heads": 6,
        "num_kv_heads": 2,
        "head_dim": 16,
        "rms_norm_eps": 1e-5,
        "rope": RopeConfig(),
        "max_context_tokens": 2048,
        "context_limit_tokens": 2048,
    }
    return ModelConfig(**(fields | changes))  # type: ignore[arg-type]


def tiny_weights(config: ModelConfig, dtype: torch.dtype, seed: int = 0) -> DecoderWeights:
    """Random weights, large enough that attention and logits are far from uniform."""
    generator = torch.Generator().manual_seed(seed)

    def matrix(out_features: int, in_features: int) -> torch.Tensor:
        return torch.randn(out_features, in_features, generator=generator).mul_(1.5 * in_features**-0.5).to(dtype)

    def norm(size: int) -> torch.Tensor:
        return torch.rand(size, generator=generator).add_(0.5).to(dtype)

    D, F, H = config.hidden_size, config.intermediate_size, config.head_dim
    layers = tuple(
        LayerWeights(
            input_norm_D=norm(D),
            qkv_ED=matrix(config.q_size + 2 * config.kv_size, D),
            o_DE=matrix(D, config.q_size),
            post_norm_D=norm(D),
            gate_up_FD=matrix(2 * F, D),
            down_DF=matrix(D, F),
            qkv_bias_E=norm(config.q_size + 2 * config.kv_size) if config.qkv_bias else None,
            q_norm_H=norm(H) if config.qk_norm else None,
            k_norm_H=norm(H) if config.qk_norm else None,
        )
        for _ in range(config.num_layers)
    )
    embed_VD = matrix(config.vocab_size, D)
    return DecoderWeights(embed_VD, layers, norm(D), matrix(config.vocab_size, D))


def tiny_decoder(config: ModelConfig, dtype: torch.dtype = torch.float32) -> Decoder:
    """A decoder with the kernels of the CPU."""
    return Decoder(config, tiny_weights(config, dtype), choose_kernels(torch.device("cpu"), dtype))
