"""A model's config from GGUF metadata.

The key names are those of ggml's docs/gguf.md and of llama.cpp's src/llama-arch.cpp. A key of the architecture that is
not known here may change the computation, so it is refused by name.
"""

import math

from triode.errors import CorruptModel, UnsupportedModel
from triode.models.config import DtypeName, ModelConfig, RopeConfig
from triode.models.gguf import GGUFFile
from triode.models.gguf_tensors import read_vector
from triode.models.registry import family

_KNOWN_KEYS = frozenset(
    {
        "attention.head_count",
        "attention.head_count_kv",
        "attention.key_length",
        "attention.layer_norm_rms_epsilon",
        "attention.sliding_window",
        "attention.value_length",
        "block_count",
        "context_length",
        "embedding_length",
        "expert_count",
        "expert_used_count",
        "feed_forward_length",
        "rope.dimension_count",
        "rope.freq_base",
        "rope.scale_linear",
        "rope.scaling.attn_factor",
        "rope.scaling.factor",
        "rope.scaling.finetuned",
        "rope.scaling.original_context_length",
        "rope.scaling.type",
        "rope.scaling.yarn_beta_fast",
        "rope.scaling.yarn_beta_slow",
        "vocab_size",
    }
)
_EOS_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")
_DTYPES: dict[str, DtypeName] = {"F32": "float32", "F16": "float16"}


def read_config(file: GGUFFile) -> ModelConfig:
    """The config of the model in `file`.

    Raises:
        CorruptModel: a needed key is missing or has a value of the wrong kind.
        UnsupportedModel: the architecture or a feature is not supported.
    """
    keys = _Keys(file)
    heads, hidden = keys.integer("attention.head_count"), keys.integer("embedding_length")
    head_dim = keys.integer("attention.key_length", hidden // max(heads, 1))
    layers, context_tokens = keys.integer("block_count"), keys.integer("context_length")
    _refuse_unsupported(keys, head_dim)
    window = keys.integer("attention.sliding_window", 0) or None
    rope = _read_rope(keys)
    if (embedding := file.tensors.get("token_embd.weight")) is None:
        raise CorruptModel(f"{file.path}: tensor token_embd.weight is missing")
    try:
        return ModelConfig(
            architecture=keys.architecture,
            vocab_size=embedding.shape[0],
            hidden_size=hidden,
            intermediate_size=keys.integer("feed_forward_length"),
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=keys.integer("attention.head_count_kv", heads),
            head_dim=head_dim,
            rms_norm_eps=keys.number("attention.layer_norm_rms_epsilon"),
            rope=rope,
            max_context_tokens=context_tokens,
            context_limit_tokens=context_tokens,
            tie_word_embeddings="output.weight" not in file.tensors,
            qkv_bias="blk.0.attn_q.bias" in file.tensors,
            o_bias="blk.0.attn_output.bias" in file.tensors,
            mlp_bias="blk.0.ffn_down.bias" in file.tensors,
            qk_norm=family(keys.architecture, file.path).qk_norm,
            sliding_window_tokens=window,
            sliding_layers=(True,) * layers if window else (),
            bos_token_id=keys.token_id("bos_token_id"),
            eos_token_ids=tuple(dict.fromkeys(i for key in _EOS_KEYS if (i := keys.token_id(key)) is not None)),
            dtype=_DTYPES.get(embedding.quantization, "bfloat16"),
        )
    except ValueError as error:
        raise CorruptModel(f"{file.path}: {error}") from error


class _Keys:
    """Typed access to the metadata of one architecture."""

    def __init__(self, file: GGUFFile) -> None:
        self.file = file
        architecture = file.metadata.get("general.architecture")
        family(architecture, file.path)
        self.architecture = str(architecture)
        for key in file.metadata:
            prefix, _, rest = key.partition(".")
            if prefix == architecture and rest not in _KNOWN_KEYS:
                raise UnsupportedModel(f"{file.path}: unsupported feature: {key} = {file.metadata[key]!r}")

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.file.metadata.get(f"{self.architecture}.{key}", default)
        if type(value) is not int:
            raise self.wrong(key, "an integer", value)
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.file.metadata.get(f"{self.architecture}.{key}", default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise self.wrong(key, "a number", value)
        return float(value)

    def string(self, key: str, default: str) -> str:
        value = self.file.metadata.get(f"{self.architecture}.{key}", default)
        if not isinstance(value, str):
            raise self.wrong(key, "a string", value)
        return value

    def token_id(self, key: str) -> int | None:
        value = self.file.metadata.get(f"tokenizer.ggml.{key}")
        return value if type(value) is int else None

    def wrong(self, key: str, kind: str, value: object) -> CorruptModel | UnsupportedModel:
        name = f"{self.file.path}: {self.architecture}.{key}"
        if isinstance(value, list):
            return UnsupportedModel(f"{name} differs by layer, which is not supported: {value[:8]}")
        return CorruptModel(f"{name} is missing" if value is None else f"{name} must be {kind}, got {value!r}")


def _refuse_unsupported(keys: _Keys, head_dim: int) -> None:
    path = keys.file.path
    if (experts := keys.integer("expert_count", 0)) > 0:
        raise UnsupportedModel(f"{path}: mixture of experts is not supported (expert_count = {experts})")
    if (value_length := keys.integer("attention.value_length", head_dim)) != head_dim:
        raise UnsupportedModel(
            f"{path}: values of {value_length} dimensions beside keys of {head_dim} are not supported"
        )
    if (rotary := keys.integer("rope.dimension_count", head_dim)) != head_dim:
        raise UnsupportedModel(f"{path}: partial rotary is not supported ({rotary} of {head_dim} dimensions)")


def _read_rope(keys: _Keys) -> RopeConfig:
    theta = keys.number("rope.freq_base", 10_000.0)
    kind = keys.string("rope.scaling.type", "none")
    factor = keys.number("rope.scaling.factor", keys.number("rope.scale_linear", 1.0))
    if "rope_freqs.weight" in keys.file.tensors:
        if kind != "none":
            raise UnsupportedModel(f"{keys.file.path}: rope scaling {kind!r} beside rope_freqs.weight is not supported")
        return RopeConfig(theta=theta, kind="factors", short_factors=_factors(keys, "rope_freqs.weight"))
    match kind:
        case "none" if factor == 1:
            return RopeConfig(theta=theta)
        case "none" | "linear":
            return RopeConfig(theta=theta, kind="linear", factor=factor)
        case "yarn":
            return _read_yarn(keys, theta, factor)
        case "longrope":
            return RopeConfig(
                theta=theta,
                kind="longrope",
                factor=factor,
                original_max_position=keys.integer("rope.scaling.original_context_length"),
                attention_factor=keys.number("rope.scaling.attn_factor", 1.0),
                short_factors=_factors(keys, "rope_factors_short.weight"),
                long_factors=_factors(keys, "rope_factors_long.weight"),
            )
    raise UnsupportedModel(f"{keys.file.path}: unsupported rope scaling {kind!r}")


def _read_yarn(keys: _Keys, theta: float, factor: float) -> RopeConfig:
    # ggml multiplies the paper's attention factor by its own.
    scale = keys.number("rope.scaling.attn_factor", 1.0)
    return RopeConfig(
        theta=theta,
        kind="yarn",
        factor=factor,
        original_max_position=keys.integer("rope.scaling.original_context_length"),
        attention_factor=None if scale == 1 else scale * (0.1 * math.log(factor) + 1),
        beta_fast=keys.number("rope.scaling.yarn_beta_fast", 32.0),
        beta_slow=keys.number("rope.scaling.yarn_beta_slow", 1.0),
    )


def _factors(keys: _Keys, name: str) -> tuple[float, ...]:
    if (tensor := keys.file.tensors.get(name)) is None:
        raise CorruptModel(f"{keys.file.path}: tensor {name} is missing")
    return read_vector(keys.file, tensor)
