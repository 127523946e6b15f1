"""A model's config from GGUF metadata.

The key names are those of ggml's docs/gguf.md and of llama.cpp's src/llama-arch.cpp. A key of the architecture that is
not known here may change the computation, so it is refused by name.
"""

import math

from triode.errors import CorruptModel, UnsupportedModel
from triode.models.config import DtypeName, ModelConfig, RopeConfig, check_num_layers
from triode.models.fields import Fields
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
    architecture = str(file.metadata.get("general.architecture"))
    members = family(architecture, file.path)
    _refuse_unknown_keys(file, architecture)
    keys = Fields(str(file.path), file.metadata, f"{architecture}.")
    heads, hidden = keys.integer("attention.head_count"), keys.integer("embedding_length")
    head_dim = keys.integer("attention.key_length", hidden // max(heads, 1))
    layers, context_tokens = keys.integer("block_count"), keys.integer("context_length")
    _refuse_unsupported(keys, head_dim)
    window = keys.integer("attention.sliding_window", 0) or None
    rope = _read_rope(file, keys)
    if (embedding := file.tensors.get("token_embd.weight")) is None:
        raise CorruptModel(f"{file.path}: tensor token_embd.weight is missing")
    try:
        check_num_layers(layers)
        return ModelConfig(
            architecture=architecture,
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
            qk_norm=members.qk_norm,
            sliding_window_tokens=window,
            sliding_layers=(True,) * layers if window else (),
            bos_token_id=_token_id(file, "bos_token_id"),
            eos_token_ids=tuple(dict.fromkeys(i for key in _EOS_KEYS if (i := _token_id(file, key)) is not None)),
            dtype=_DTYPES.get(embedding.quantization, "bfloat16"),
        )
    except ValueError as error:
        raise CorruptModel(f"{file.path}: {error}") from error


def _refuse_unknown_keys(file: GGUFFile, architecture: str) -> None:
    for key, value in file.metadata.items():
        prefix, _, rest = key.partition(".")
        if prefix != architecture:
            continue
        if rest not in _KNOWN_KEYS:
            raise UnsupportedModel(f"{file.path}: unsupported feature: {key} = {value!r:.80}")
        if isinstance(value, list):
            raise UnsupportedModel(f"{file.path}: unsupported feature: {key} differs by layer")


def _token_id(file: GGUFFile, key: str) -> int | None:
    value = file.metadata.get(f"tokenizer.ggml.{key}")
    return value if type(value) is int else None


def _refuse_unsupported(keys: Fields, head_dim: int) -> None:
    path = keys.source
    if (experts := keys.integer("expert_count", 0)) > 0:
        raise UnsupportedModel(f"{path}: mixture of experts is not supported (expert_count = {experts})")
    if (value_length := keys.integer("attention.value_length", head_dim)) != head_dim:
        raise UnsupportedModel(
            f"{path}: values of {value_length} dimensions beside keys of {head_dim} are not supported"
        )
    if (rotary := keys.integer("rope.dimension_count", head_dim)) != head_dim:
        raise UnsupportedModel(f"{path}: partial rotary is not supported ({rotary} of {head_dim} dimensions)")


def _read_rope(file: GGUFFile, keys: Fields) -> RopeConfig:
    theta = keys.number("rope.freq_base", 10_000.0)
    kind = keys.string("rope.scaling.type", "none")
    factor = keys.number("rope.scaling.factor", keys.number("rope.scale_linear", 1.0))
    if "rope_freqs.weight" in file.tensors:
        if kind != "none":
            raise UnsupportedModel(f"{file.path}: rope scaling {kind!r} beside rope_freqs.weight is not supported")
        return RopeConfig(theta=theta, kind="factors", short_factors=_factors(file, "rope_freqs.weight"))
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
                short_factors=_factors(file, "rope_factors_short.weight"),
                long_factors=_factors(file, "rope_factors_long.weight"),
            )
    raise UnsupportedModel(f"{file.path}: unsupported rope scaling {kind!r}")


def _read_yarn(keys: Fields, theta: float, factor: float) -> RopeConfig:
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


def _factors(file: GGUFFile, name: str) -> tuple[float, ...]:
    if (tensor := file.tensors.get(name)) is None:
        raise CorruptModel(f"{file.path}: tensor {name} is missing")
    return read_vector(file, tensor)
