"""Rotary settings from config.json, in both of the shapes that transformers has given them.

Since transformers 5 there is one `rope_parameters`; before, there was `rope_theta` beside `rope_scaling`.
"""

from triode.errors import CorruptModel, UnsupportedModel
from triode.models.config import RopeConfig
from triode.models.fields import Fields

_KNOWN_KEYS = frozenset(
    {
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "factor",
        "finetuned",
        "high_freq_factor",
        "long_factor",
        "low_freq_factor",
        "mscale",
        "mscale_all_dim",
        "original_max_position_embeddings",
        "partial_rotary_factor",
        "rope_theta",
        "rope_type",
        "short_factor",
        "truncate",
        "type",
    }
)


def read_rope(config: Fields) -> RopeConfig:
    """The rotary settings of a config.json.

    Raises:
        CorruptModel: a needed number is missing or of the wrong kind.
        UnsupportedModel: the rope type is unknown, or rotates only a part of each head.
    """
    name = "rope_parameters" if config.get("rope_parameters") is not None else "rope_scaling"
    values = config.get(name)
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise CorruptModel(f"{config.source}: {name} must be an object, got {values!r}")
    rope = Fields(f"{config.source}: {name}", values)
    for key, value in values.items():
        if key not in _KNOWN_KEYS:
            raise UnsupportedModel(f"{rope.source}: unsupported feature: {key} = {value!r}")
    _refuse_partial(config)
    _refuse_partial(rope)
    theta = rope.number("rope_theta", config.number("rope_theta", 10_000.0))
    return _read_kind(config, rope, theta)


def _refuse_partial(fields: Fields) -> None:
    if (part := fields.number("partial_rotary_factor", 1.0)) != 1:
        raise UnsupportedModel(f"{fields.source}: partial rotary is not supported (partial_rotary_factor = {part:g})")


def _read_kind(config: Fields, rope: Fields, theta: float) -> RopeConfig:
    match kind := rope.string("rope_type", rope.string("type", "default")):
        case "default":
            return RopeConfig(theta=theta)
        case "linear":
            return RopeConfig(theta=theta, kind="linear", factor=_factor(rope))
        case "dynamic":
            # Stretched from the configured context, whatever else the file says.
            original = config.integer("max_position_embeddings")
            return RopeConfig(theta=theta, kind="dynamic", factor=_factor(rope), original_max_position=original)
        case "yarn":
            return _read_yarn(rope, theta, _original_max_position(config, rope))
        case "llama3":
            return RopeConfig(
                theta=theta,
                kind="llama3",
                factor=_factor(rope),
                original_max_position=_original_max_position(config, rope),
                low_freq_factor=rope.number("low_freq_factor"),
                high_freq_factor=rope.number("high_freq_factor"),
            )
        case "longrope":
            original = _original_max_position(config, rope)
            return RopeConfig(
                theta=theta,
                kind="longrope",
                factor=rope.number("factor", config.integer("max_position_embeddings") / original),
                original_max_position=original,
                attention_factor=rope.optional_number("attention_factor"),
                short_factors=rope.numbers("short_factor"),
                long_factors=rope.numbers("long_factor"),
            )
    raise UnsupportedModel(f"{rope.source}: unsupported rope type {kind!r}")


def _read_yarn(rope: Fields, theta: float, original: int) -> RopeConfig:
    return RopeConfig(
        theta=theta,
        kind="yarn",
        factor=_factor(rope),
        original_max_position=original,
        attention_factor=rope.optional_number("attention_factor"),
        # Zero means the default, as it does to transformers.
        beta_fast=rope.number("beta_fast", 0.0) or 32.0,
        beta_slow=rope.number("beta_slow", 0.0) or 1.0,
        mscale=rope.optional_number("mscale"),
        mscale_all_dim=rope.optional_number("mscale_all_dim"),
        truncate=rope.flag("truncate", True),
    )


def _factor(rope: Fields) -> float:
    if (factor := rope.number("factor")) < 1:
        raise CorruptModel(f"{rope.source}: factor must be >= 1, got {factor:g}")
    return factor


def _original_max_position(config: Fields, rope: Fields) -> int:
    key = "original_max_position_embeddings"
    original = rope.integer(key, config.integer(key, config.integer("max_position_embeddings")))
    if original < 1:
        raise CorruptModel(f"{rope.source}: {key} must be >= 1, got {original}")
    return original
