"""What a decoder looks like: its sizes, and the few switches by which the supported families differ.

`ModelOptions` is what a caller asks for; `ModelConfig` describes every model. The readers of config.json
(`hf_config.py`) and of GGUF metadata (`gguf_config.py`) fill it and refuse, by name, whatever it cannot express.
"""

import math
from typing import Literal, get_args

import msgspec

from triode.models.quantization import Quantization, plan_weights

DtypeName = Literal["float32", "bfloat16", "float16"]
DtypeChoice = Literal["auto", "float32", "bfloat16", "float16"]
DeviceChoice = Literal["auto", "cpu", "cuda"]
KernelChoice = Literal["auto", "reference", "native"]
RopeKind = Literal["default", "linear", "dynamic", "yarn", "llama3", "longrope", "factors"]


class ModelOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which model to open, and how."""

    model: str
    """A built-in alias, a folder, a `.gguf` file, `random:NAME`, or a Hugging Face id."""
    dtype: DtypeChoice = "auto"
    """The weights' dtype; auto takes the fastest one that the device computes in."""
    device: DeviceChoice = "auto"
    """Where the model runs; auto takes the GPU if there is one."""
    kernels: KernelChoice = "auto"
    """What computes a step on the CPU: native code, compiled at first use, or torch operations (reference); auto takes
    native code where there is a C++ compiler."""
    quantization: Quantization = "none"
    """How native kernels keep matrices: as they are (none), rounded to 8 bits (a16w8, a8w8) or 4 (a16w4,
    a8w4; the head to 8), or in the blocks of a GGUF file (a16gguf, a8gguf). With a8, activations are rounded to 8 bits as
    well, which is faster."""
    quantization_group: int | None = None
    """Inputs of a matrix that share a scale: 32, 64 or 128, or 0 for all inputs of an output (8 bits only; then activations
    of 8 bits have one scale a token, too). None takes the format's own: 64 for a8w8, 32 for 4 bits, 0 for a16w8."""
    quantization_overrides: dict[str, str] = {}
    """Other formats for the matrices whose whole names a regular expression matches: layers.0.qkv, .o, .gate_up, .down, and
    so on, head, and embedding. The first that matches counts."""
    packed_cache: str | None = None
    """A file for the matrices as native kernels keep them, which the next start reads instead of the model's own files; it
    is written if it is not there, or was made of something else. With tensor_parallel each process has one, named after it."""
    max_context_tokens: int | None = None
    """The longest sequence to serve; None takes what the model is made for."""
    weights_seed: int = 0
    """Seeds the weights of a `random:` model."""

    def __post_init__(self) -> None:
        if type(self.model) is not str or not self.model:
            raise ValueError(f"model must be a non-empty string, got {self.model!r}")
        for name, choice in _CHOICES.items():
            choices = get_args(choice)
            if (value := getattr(self, name)) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
        plan_weights(self.quantization, self.quantization_group, self.quantization_overrides)
        limit = self.max_context_tokens
        if limit is not None and (type(limit) is not int or limit < 1):
            raise ValueError(f"max_context_tokens must be an integer >= 1, got {limit!r}")
        if type(self.weights_seed) is not int or not 0 <= self.weights_seed < 2**63:
            raise ValueError(f"weights_seed must be an integer >= 0 and < 2**63, got {self.weights_seed!r}")


_CHOICES: dict[str, object] = {
    "dtype": DtypeChoice,
    "device": DeviceChoice,
    "kernels": KernelChoice,
    "quantization": Quantization,
}


class RopeConfig(msgspec.Struct, frozen=True, kw_only=True):
    """How positions become rotation angles. A field is None where its `kind` does not use it.

    The kinds are those of transformers' `modeling_rope_utils`, and one more: `factors` divides each frequency by a
    factor stored in the file, which is how GGUF carries Llama 3's scaling.
    """

    theta: float = 10_000.0
    """The base: frequency i of `head_dim / 2` is `theta ** (-2 i / head_dim)`, before scaling."""
    kind: RopeKind = "default"
    factor: float | None = None
    """How much further positions reach (all kinds but `default` and `factors`)."""
    original_max_position: int | None = None
    """The context the model was trained with before it was extended (`dynamic`, `yarn`, `llama3`, `longrope`)."""
    attention_factor: float | None = None
    """Multiplies cos and sin (`yarn`, `longrope`); None derives it from `factor` as the paper does."""
    beta_fast: float = 32.0
    """Frequencies with more rotations than this over the original context are kept (`yarn`)."""
    beta_slow: float = 1.0
    """Frequencies with fewer rotations than this are divided by `factor` (`yarn`)."""
    mscale: float | None = None
    mscale_all_dim: float | None = None
    """With `mscale`, another way to derive the attention factor (`yarn`)."""
    truncate: bool = True
    """Whether the ends of the ramp between the two are rounded to whole dimensions (`yarn`)."""
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    """Wavelengths from `original / high` to `original / low` are blended (`llama3`)."""
    short_factors: tuple[float, ...] | None = None
    """Divisors of the `head_dim / 2` frequencies in a context up to the original (`longrope`), or always (`factors`)."""
    long_factors: tuple[float, ...] | None = None
    """The divisors in a longer context (`longrope`)."""


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True):
    """A decoder-only transformer: RMSNorm, rotary attention with grouped KV heads, SwiGLU."""

    architecture: str
    """A family of `registry.FAMILIES`."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: RopeConfig
    max_context_tokens: int
    """The longest sequence this engine serves; length-dependent rope scalings are fixed for it."""
    context_limit_tokens: int
    """The longest sequence the model is made for."""
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    """Whether each head of q and k is normalised before the rotation (Qwen3)."""
    sliding_window_tokens: int | None = None
    """A query sees this many positions, its own included, in `sliding_layers`."""
    sliding_layers: tuple[bool, ...] = ()
    """Per layer, whether it uses the sliding window; empty without one."""
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    dtype: DtypeName = "float32"
    """The dtype of the checkpoint's weights, as it declares it."""

    def __post_init__(self) -> None:
        for name in _SIZES:
            if not 1 <= (value := getattr(self, name)) <= _MAX_SIZE:
                raise ValueError(f"{name} must be >= 1 and <= {_MAX_SIZE}, got {value}")
        check_num_layers(self.num_layers)
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads must be a multiple of num_kv_heads = {self.num_kv_heads}, got {self.num_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even, because rotary pairs dimensions, got {self.head_dim}")
        if not self.rms_norm_eps > 0:
            raise ValueError(f"rms_norm_eps must be > 0, got {self.rms_norm_eps}")
        if not 0 < self.rope.theta < math.inf:
            raise ValueError(f"rope.theta must be > 0 and finite, got {self.rope.theta}")
        if self.max_context_tokens > self.context_limit_tokens:
            limit = self.context_limit_tokens
            raise ValueError(f"max_context_tokens must be <= {limit} for this model, got {self.max_context_tokens}")
        if self.sliding_layers and len(self.sliding_layers) != self.num_layers:
            raise ValueError(f"sliding_layers must have {self.num_layers} entries, got {len(self.sliding_layers)}")
        for factors in (self.rope.short_factors, self.rope.long_factors):
            if factors is not None and len(factors) != self.head_dim // 2:
                raise ValueError(
                    f"rope factors must have head_dim / 2 = {self.head_dim // 2} entries, got {len(factors)}"
                )

    @property
    def q_size(self) -> int:
        """Rows of the query projection."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Rows of the key projection, and of the value projection."""
        return self.num_kv_heads * self.head_dim

    def window_tokens(self, layer: int) -> int | None:
        """How many positions a query of `layer` sees, its own included; None sees all."""
        return self.sliding_window_tokens if self.sliding_layers and self.sliding_layers[layer] else None


_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "max_context_tokens",
)
# No model comes near these; a corrupt file does.
_MAX_SIZE, _MAX_LAYERS = 2**31 - 1, 4096


def check_num_layers(num_layers: int) -> None:
    """Refuse a number of layers that no model has, before anything is made for each of them.

    Raises:
        ValueError: naming the limit and the number.
    """
    if num_layers > _MAX_LAYERS:
        raise ValueError(f"num_layers must be <= {_MAX_LAYERS}, got {num_layers}")
