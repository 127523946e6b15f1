from pathlib import Path
from typing import Any

import msgspec
import pytest

from triode.errors import CorruptModel, ModelNotFound, UnsupportedModel
from triode.models.config import ModelConfig, ModelOptions
from triode.models.hf_config import parse_config, read_config

LLAMA_2_7B = {
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "use_cache": True,
    "vocab_size": 32000,
}
LLAMA_3_1_8B = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}
MISTRAL_7B_V01 = {
    "architectures": ["MistralForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 32000,
}
QWEN_2_5_7B = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "model_type": "qwen2",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 152064,
}
QWEN_3_0_6B = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "max_window_layers": 28,
    "model_type": "qwen3",
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 151936,
}


def parse(values: dict[str, object], generation: dict[str, object] | None = None, **changes: object) -> ModelConfig:
    return parse_config("config.json", {**values, **changes}, generation or {})


def test_llama_2_has_as_many_kv_heads_as_heads_and_float16_weights() -> None:
    config = parse(LLAMA_2_7B)
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (32, 32, 128)
    assert (config.rope.theta, config.rope.kind, config.dtype) == (10_000.0, "default", "float16")
    assert (config.bos_token_id, config.eos_token_ids, config.max_context_tokens) == (1, (2,), 4096)


def test_heads_without_a_kv_count_are_their_own_kv_heads() -> None:
    values = {key: value for key, value in LLAMA_2_7B.items() if key != "num_key_value_heads"}
    assert parse(values).num_kv_heads == 32


def test_llama_3_1_has_its_own_rope_scaling_and_three_ends() -> None:
    config = parse(LLAMA_3_1_8B)
    assert config.rope.kind == "llama3"
    assert (config.rope.factor, config.rope.low_freq_factor, config.rope.high_freq_factor) == (8.0, 1.0, 4.0)
    assert (config.rope.original_max_position, config.rope.theta) == (8192, 500_000.0)
    assert config.max_context_tokens == 131_072
    assert config.eos_token_ids == (128001, 128008, 128009)


def test_mistral_slides_in_every_layer_if_it_has_a_window() -> None:
    config = parse(MISTRAL_7B_V01)
    assert [config.window_tokens(layer) for layer in (0, 31)] == [4096, 4096]
    assert parse(MISTRAL_7B_V01, sliding_window=None).window_tokens(0) is None


def test_qwen2_has_qkv_biases_and_an_unused_window() -> None:
    config = parse(QWEN_2_5_7B)
    assert (config.qkv_bias, config.o_bias, config.mlp_bias, config.qk_norm) == (True, False, False, False)
    assert config.sliding_window_tokens is None


def test_qwen2_slides_from_max_window_layers_on() -> None:
    config = parse(QWEN_2_5_7B, use_sliding_window=True, max_window_layers=20)
    assert config.sliding_layers == (False,) * 20 + (True,) * 8
    assert [config.window_tokens(layer) for layer in (19, 20)] == [None, 131_072]


def test_layer_types_override_max_window_layers() -> None:
    types = ["full_attention", "sliding_attention"] * 14
    config = parse(QWEN_2_5_7B, use_sliding_window=True, layer_types=types)
    assert config.sliding_layers == (False, True) * 14


def test_qwen3_normalises_heads_of_their_own_size() -> None:
    config = parse(QWEN_3_0_6B)
    assert (config.qk_norm, config.head_dim, config.q_size, config.kv_size) == (True, 128, 2048, 1024)
    assert config.tie_word_embeddings


def test_biases_are_switched_by_the_config_where_the_family_allows_it() -> None:
    config = parse(LLAMA_2_7B, attention_bias=True, mlp_bias=True)
    assert (config.qkv_bias, config.o_bias, config.mlp_bias) == (True, True, True)


def test_the_generation_config_adds_its_ends() -> None:
    config = parse(QWEN_2_5_7B, generation={"eos_token_id": [151645, 151643]})
    assert config.eos_token_ids == (151645, 151643)


ROPE_FACTORS = {"short_factor": [1.0] * 64, "long_factor": [2.0] * 64}


@pytest.mark.parametrize(
    ("scaling", "expected"),
    [
        ({"rope_type": "default"}, {"kind": "default"}),
        ({"type": "linear", "factor": 2.0}, {"kind": "linear", "factor": 2.0}),
        ({"type": "dynamic", "factor": 2.0}, {"kind": "dynamic", "factor": 2.0, "original_max_position": 4096}),
        (
            {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 2048,
                "beta_fast": 16,
                "truncate": False,
            },
            {"kind": "yarn", "factor": 4.0, "original_max_position": 2048, "beta_fast": 16.0, "truncate": False},
        ),
        ({"rope_type": "yarn", "factor": 4.0}, {"kind": "yarn", "original_max_position": 4096, "beta_slow": 1.0}),
        (
            {"rope_type": "longrope", "original_max_position_embeddings": 1024, **ROPE_FACTORS},
            {"kind": "longrope", "factor": 4.0, "short_factors": (1.0,) * 64, "long_factors": (2.0,) * 64},
        ),
    ],
)
def test_every_rope_scaling_reads_the_same_from_both_shapes(
    scaling: dict[str, object], expected: dict[str, object]
) -> None:
    old = parse(LLAMA_2_7B, rope_theta=5e5, rope_scaling=scaling).rope
    new = parse(LLAMA_2_7B, rope_parameters={**scaling, "rope_theta": 5e5}).rope
    assert old == new
    assert old.theta == 5e5
    assert {name: getattr(old, name) for name in expected} == expected


def test_yarn_stretches_the_context_and_dynamic_only_its_limit() -> None:
    yarn = parse(LLAMA_2_7B, rope_scaling={"type": "yarn", "factor": 4.0})
    assert (yarn.max_context_tokens, yarn.context_limit_tokens) == (16_384, 16_384)
    dynamic = parse(LLAMA_2_7B, rope_scaling={"type": "dynamic", "factor": 4.0})
    assert (dynamic.max_context_tokens, dynamic.context_limit_tokens) == (4096, 16_384)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mixtral"}, "unsupported architecture 'mixtral'; supported are llama, mistral, qwen2, qwen3"),
        ({"model_type": None}, "unsupported architecture None"),
        ({"num_local_experts": 8}, "unsupported feature: num_local_experts = 8"),
        ({"quantization_config": {"quant_method": "awq"}}, "unsupported feature: quantization_config"),
        ({"hidden_act": "gelu"}, "unsupported feature: hidden_act = 'gelu'"),
        ({"final_logit_softcapping": 30.0}, "unsupported feature: final_logit_softcapping = 30.0"),
        ({"partial_rotary_factor": 0.5}, r"partial rotary is not supported \(partial_rotary_factor = 0.5\)"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial rotary is not supported"),
        ({"rope_scaling": {"type": "mrope", "factor": 2.0}}, "unsupported rope type 'mrope'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "sections": 3}}, "unsupported feature: sections = 3"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "unsupported feature: full_attention"),
        ({"torch_dtype": "float8_e4m3fn"}, "unsupported dtype 'float8_e4m3fn'"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "unsupported feature: layer type 'linear_attention'"),
    ],
)
def test_an_unsupported_feature_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModel, match=message):
        parse(LLAMA_2_7B, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": None}, "config.json: hidden_size is missing"),
        ({"hidden_size": "4096"}, "config.json: hidden_size must be an integer, got '4096'"),
        ({"hidden_size": 0, "head_dim": 128}, "hidden_size must be >= 1"),
        ({"num_hidden_layers": 10**9}, "num_layers must be <= 4096, got 1000000000"),
        ({"vocab_size": 2**40}, "vocab_size must be >= 1 and <= 2147483647"),
        ({"num_key_value_heads": 5}, "num_heads must be a multiple of num_kv_heads = 5, got 32"),
        ({"num_attention_heads": 0}, "num_heads must be >= 1"),
        ({"head_dim": 127}, "head_dim must be even"),
        ({"rms_norm_eps": 0}, "rms_norm_eps must be > 0"),
        ({"rope_theta": -1.0}, "rope.theta must be > 0"),
        ({"rope_scaling": {"type": "linear"}}, "factor is missing"),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "factor must be >= 1, got 0.5"),
        ({"rope_scaling": "linear"}, "rope_scaling must be an object"),
        (
            {"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}},
            "rope factors must have head_dim / 2 = 64 entries, got 1",
        ),
        ({"eos_token_id": "2"}, "eos_token_id must be a token id or a list of them, got '2'"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings must be true or false, got 1"),
    ],
)
def test_a_corrupt_value_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CorruptModel, match=message):
        parse(LLAMA_2_7B, **changes)


def test_layer_types_must_cover_the_layers() -> None:
    with pytest.raises(CorruptModel, match="sliding_layers must have 28 entries, got 1"):
        parse(QWEN_2_5_7B, use_sliding_window=True, layer_types=["sliding_attention"])


def test_a_folder_without_config_is_not_a_model(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"it has no config\.json"):
        read_config(tmp_path)


def test_a_config_that_is_not_json_is_corrupt(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": ')
    with pytest.raises(CorruptModel, match=r"config\.json is not a JSON object"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": ""}, "model must be a non-empty string, got ''"),
        ({"dtype": "int8"}, "dtype must be one of auto, float32, bfloat16, float16, got 'int8'"),
        ({"device": "tpu"}, "device must be one of auto, cpu, cuda, got 'tpu'"),
        ({"max_context_tokens": 0}, "max_context_tokens must be an integer >= 1, got 0"),
        ({"weights_seed": -1}, "weights_seed must be an integer >= 0"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelOptions(**{"model": "smollm2-135m", **options})


def test_an_unknown_option_is_refused() -> None:
    with pytest.raises(msgspec.ValidationError, match="unknown field `quant`"):
        msgspec.convert({"model": "x", "quant": "int8"}, ModelOptions)


def test_the_context_can_be_lowered_but_not_raised_past_the_limit() -> None:
    config = parse(LLAMA_2_7B)
    assert msgspec.structs.replace(config, max_context_tokens=100).max_context_tokens == 100
    with pytest.raises(ValueError, match="max_context_tokens must be <= 4096 for this model, got 5000"):
        msgspec.structs.replace(config, max_context_tokens=5000)
