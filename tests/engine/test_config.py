"""Settings: each by its own name, checked once, and told apart from those that do not exist."""

from typing import Any

import msgspec
import pytest

import triode
from triode.engine.config import EngineConfig, setting_names


def test_overrides_reach_the_part_they_belong_to() -> None:
    config = EngineConfig().override(
        {"model": "random:tiny", "max_running": 3, "block_size_tokens": 32, "executor": "inline", "num_threads": 1}
    )
    assert (config.options.model, config.scheduler.max_running) == ("random:tiny", 3)
    assert (config.cache.block_size_tokens, config.executor, config.num_threads) == (32, "inline", 1)
    assert config.scheduler.max_queued == EngineConfig().scheduler.max_queued


def test_overriding_nothing_changes_nothing() -> None:
    assert EngineConfig().override({}) == EngineConfig()


def test_every_setting_has_one_name_and_one_place() -> None:
    assert len(set(setting_names())) == len(setting_names())
    values = {"model": "m", "executor": "inline"}
    for name in setting_names():
        default = EngineConfig()
        parts = [default, *(getattr(default, part) for part in default.__struct_fields__)]
        homes = [part for part in parts if name in getattr(part, "__struct_fields__", ())]
        assert len(homes) == 1
        given = values.get(name, getattr(homes[0], name))
        assert isinstance(default.override({name: given}), EngineConfig)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_runing": 3}, r"config keys must be among block_size_tokens, .*, got max_runing"),
        ({"b": 1, "a": 2}, r"config keys must be among .*, got a, b"),
        ({"scheduler": None}, r"config keys must be among .*, got scheduler"),
        ({"executor": "fiber"}, r"executor must be one of auto, inline, thread.*, got 'fiber'"),
        ({"num_threads": 0}, r"num_threads must be an integer >= 1, got 0"),
        ({"num_threads": True}, r"num_threads must be an integer >= 1, got True"),
        ({"tensor_parallel": 0}, r"tensor_parallel must be an integer >= 1, got 0"),
        (
            {"tensor_parallel": 2, "executor": "thread"},
            r"executor must be auto or process with tensor_parallel = 2, got",
        ),
        ({"numa_nodes": (0,), "executor": "inline"}, r"executor must be auto or process with numa_nodes, got 'inline'"),
        ({"numa_nodes": (0, 1)}, r"numa_nodes must be one for each of tensor_parallel = 1 processes, got \(0, 1\)"),
        ({"numa_nodes": (-1,)}, r"numa_nodes must be integers >= 0 and < 1024, got \(-1,\)"),
        ({"warm_guides": 1}, r"warm_guides must be True or False, got 1"),
        ({"max_running": 0}, r"max_running must be an integer >= 1, got 0"),
        ({"max_queued": 1.5}, r"max_queued must be an integer >= 1, got 1.5"),
        ({"max_running": 8, "max_step_tokens": 8}, r"max_step_tokens must be > max_running = 8, .*, got 8"),
        ({"block_size_tokens": 17}, r"block_size_tokens must be 16, 32, 64 or 128, got 17"),
        ({"kv_cache_bytes": 0}, r"kv_cache_bytes must be >= 1, got 0"),
        ({"kv_cache_fraction": 1.5}, r"kv_cache_fraction must be in \(0, 1\], got 1.5"),
        ({"prefix_cache_ttl_s": 0}, r"prefix_cache_ttl_s must be > 0 and finite, got 0"),
        ({"dtype": "int8"}, r"dtype must be one of auto, float32, bfloat16, float16, got 'int8'"),
        ({"device": "tpu"}, r"device must be one of auto, cpu, cuda, got 'tpu'"),
        ({"max_context_tokens": 0}, r"max_context_tokens must be an integer >= 1, got 0"),
        ({"model": ""}, r"model must be a non-empty string, got ''"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        EngineConfig().override(settings)


async def test_a_wrong_setting_is_refused_before_anything_is_loaded() -> None:
    with pytest.raises(ValueError, match=r"config keys must be among .*, got max_runing"):
        async with triode.open_engine("no such model", max_runing=3):
            pass
    with pytest.raises(ValueError, match=r"config keys must be among .*, got max_runing"):
        triode.LLM("no such model", max_runing=3)


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(AttributeError, match="immutable"):
        EngineConfig().executor = "inline"  # type: ignore[misc]


def test_a_config_travels_as_json() -> None:
    config = EngineConfig().override({"max_running": 3, "prefix_cache_ttl_s": 1.5})
    assert msgspec.json.decode(msgspec.json.encode(config), type=EngineConfig) == config
    with pytest.raises(msgspec.ValidationError, match="unknown field `max_runing`"):
        msgspec.json.decode(b'{"scheduler": {"max_runing": 3}}', type=EngineConfig)
