"""The supported model families, as a table of how they differ.

All are the same decoder (RMSNorm, grouped-query rotary attention, SwiGLU); a family says which of its optional parts are
there and what a config may switch.
"""

import msgspec

from triode.errors import UnsupportedModel


class Family(msgspec.Struct, frozen=True, kw_only=True):
    """What a `model_type` implies where config.json is silent, and what config.json may say."""

    qkv_bias: bool = False
    """q, k and v have biases whatever the config says (Qwen2)."""
    attention_bias_option: bool = False
    """`attention_bias` gives biases to q, k, v and o."""
    mlp_bias_option: bool = False
    """`mlp_bias` gives biases to the MLP."""
    qk_norm: bool = False
    head_dim: int | None = None
    """The head size where the config has none; None divides the hidden size by the heads."""
    sliding_window: bool = False
    """`sliding_window` holds for all layers."""
    optional_sliding_window: bool = False
    """`use_sliding_window` turns it on, for the layers of `layer_types` or from `max_window_layers` on."""


FAMILIES: dict[str, Family] = {
    "llama": Family(attention_bias_option=True, mlp_bias_option=True),
    "mistral": Family(sliding_window=True),
    "qwen2": Family(qkv_bias=True, optional_sliding_window=True),
    "qwen3": Family(attention_bias_option=True, qk_norm=True, head_dim=128, optional_sliding_window=True),
}


def family(name: object, path: object) -> Family:
    """The family called `name`.

    Raises:
        UnsupportedModel: there is none.
    """
    if not isinstance(name, str) or name not in FAMILIES:
        raise UnsupportedModel(f"{path}: unsupported architecture {name!r}; supported are {', '.join(FAMILIES)}")
    return FAMILIES[name]
