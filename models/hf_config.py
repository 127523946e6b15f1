"""A model's config from the config.json and generation_config.json of a Hugging Face folder."""

from collections.abc import Mapping
from pathlib import Path

import msgspec

from triode.errors import CorruptModel, ModelNotFound, UnsupportedModel
from triode.models.config import DtypeName, ModelConfig, RopeConfig, check_num_layers
from triode.models.fields import Fields
from triode.models.registry import Family, family
from triode.models.rope_config import read_rope

# Keys that change the computation in ways this engine has no switch for, and the values at which they do not.
_UNSUPPORTED: dict[str, tuple[object, ...]] = {
    "alibi": (False,),
    "attention_chunk_size": (),
    "attention_multiplier": (),
    "attn_logit_softcapping": (),
    "clip_qkv": (),
    "compression_config": (),
    "embedding_multiplier": (1,),
    "final_logit_softcapping": (),
    "is_encoder_decoder": (False,),
    "logit_scale": (1,),
    "logits_scaling": (1,),
    "n_routed_experts": (0,),
    "no_rope_layers": ([],),
    "num_experts": (0,),
    "num_local_experts": (0,),
    "qk_layernorm": (False,),
    "quantization_config": (),
    "query_pre_attn_scalar": (),
    "residual_multiplier": (1,),
    "rope_interleaved": (False,),
    "text_config": (),
    "use_qk_norm": (False,),
    "vision_config": (),
}
_DTYPES: tuple[DtypeName, ...] = ("float32", "bfloat16", "float16")


def read_config(folder: Path) -> ModelConfig:
    """The config of the model in `folder`.

    Raises:
        ModelNotFound: there is no config.json.
        CorruptModel: a value is missing, of the wrong kind, or contradicts another.
        UnsupportedModel: the architecture or a feature is not supported.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ModelNotFound(f"{folder} is not a model's folder: it has no config.json")
    generation = folder / "generation_config.json"
    return parse_config(str(path), read_json(path), read_json(generation) if generation.is_file() else {})


def read_json(path: Path) -> dict[str, object]:
    """The JSON object in a file; CorruptModel if there is none."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, object])
    except msgspec.DecodeError as error:
        raise CorruptModel(f"{path} is not a JSON object: {error}") from error


def parse_config(source: str, values: Mapping[str, object], generation: Mapping[str, object]) -> ModelConfig:
    """The config that the contents of config.json and generation_config.json describe; `source` names it in messages."""
    config = Fields(source, values)
    members = family(config.get("model_type"), source)
    _refuse_unsupported(config)
    rope = read_rope(config)
    layers, heads = config.integer("num_hidden_layers"), config.integer("num_attention_heads")
    head_dim = config.integer("head_dim", members.head_dim or config.integer("hidden_size") // max(heads, 1))
    context_tokens = config.integer("max_position_embeddings")
    attention_bias = members.attention_bias_option and config.flag("attention_bias", False)
    try:
        check_num_layers(layers)
        window, sliding_layers = _sliding_window(config, members, layers)
        return ModelConfig(
            architecture=config.string("model_type"),
            vocab_size=config.integer("vocab_size"),
            hidden_size=config.integer("hidden_size"),
            intermediate_size=config.integer("intermediate_size"),
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=config.integer("num_key_value_heads", heads),
            head_dim=head_dim,
            rms_norm_eps=config.number("rms_norm_eps", 1e-6),
            rope=rope,
            max_context_tokens=max(context_tokens, _extended_tokens(rope) if rope.kind == "yarn" else 0),
            context_limit_tokens=max(context_tokens, _extended_tokens(rope)),
            tie_word_embeddings=config.flag("tie_word_embeddings", False),
            qkv_bias=members.qkv_bias or attention_bias,
            o_bias=attention_bias,
            mlp_bias=members.mlp_bias_option and config.flag("mlp_bias", False),
            qk_norm=members.qk_norm,
            sliding_window_tokens=window,
            sliding_layers=sliding_layers,
            bos_token_id=next(iter(_token_ids(config, "bos_token_id")), None),
            eos_token_ids=_eos_token_ids(config, generation),
            dtype=_dtype(config),
        )
    except ValueError as error:
        raise CorruptModel(f"{source}: {error}") from error


def _refuse_unsupported(config: Fields) -> None:
    for key, neutral in _UNSUPPORTED.items():
        value = config.get(key)
        if value is not None and value not in neutral:
            raise UnsupportedModel(f"{config.source}: unsupported feature: {key} = {value!r:.80}")
    if (activation := config.string("hidden_act", "silu")) != "silu":
        raise UnsupportedModel(
            f"{config.source}: unsupported feature: hidden_act = {activation!r}; supported is 'silu'"
        )


def _extended_tokens(rope: RopeConfig) -> int:
    """The context to which a scaling stretches what `max_position_embeddings` may still say unstretched."""
    if rope.kind not in ("yarn", "dynamic") or rope.factor is None or rope.original_max_position is None:
        return 0
    return int(rope.factor * rope.original_max_position)


def _sliding_window(config: Fields, members: Family, num_layers: int) -> tuple[int | None, tuple[bool, ...]]:
    """The window and the layers that use it; (None, ()) where none does."""
    has_window = members.sliding_window or (
        members.optional_sliding_window and config.flag("use_sliding_window", False)
    )
    window = config.integer("sliding_window") if has_window and config.get("sliding_window") is not None else None
    if window is not None and window < 1:
        raise CorruptModel(f"{config.source}: sliding_window must be >= 1, got {window}")
    types = config.get("layer_types")
    if isinstance(types, list) and (members.optional_sliding_window or "full_attention" in types):
        layers = tuple(_is_sliding(config, kind) for kind in types)
    elif members.optional_sliding_window and window is not None:
        layers = tuple(index >= config.integer("max_window_layers", 28) for index in range(num_layers))
    else:
        layers = (True,) * num_layers
    return (window, layers) if window is not None and any(layers) else (None, ())


def _is_sliding(config: Fields, kind: object) -> bool:
    if kind not in ("full_attention", "sliding_attention"):
        raise UnsupportedModel(f"{config.source}: unsupported feature: layer type {kind!r}")
    return kind == "sliding_attention"


def _eos_token_ids(config: Fields, generation: Mapping[str, object]) -> tuple[int, ...]:
    """Those that generation_config.json gives, then those of config.json."""
    ids = _token_ids(Fields(config.source.replace("config.json", "generation_config.json"), generation), "eos_token_id")
    return tuple(dict.fromkeys(ids + _token_ids(config, "eos_token_id")))


def _token_ids(fields: Fields, key: str) -> tuple[int, ...]:
    value = fields.get(key)
    ids = () if value is None else tuple(value) if isinstance(value, list) else (value,)
    for token_id in ids:
        if type(token_id) is not int:
            raise CorruptModel(f"{fields.source}: {key} must be a token id or a list of them, got {value!r}")
    return ids


def _dtype(config: Fields) -> DtypeName:
    name = config.string("dtype", config.string("torch_dtype", "float32"))
    for known in _DTYPES:
        if name == known:
            return known
    raise UnsupportedModel(f"{config.source}: unsupported dtype {name!r}; supported are {', '.join(_DTYPES)}")
