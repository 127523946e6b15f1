"""Engines for the proofs on a GPU, and the same in small on the CPU, so that a proof is known to work before a GPU is
at hand."""

import itertools
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any

import pytest

import triode
from engines import drawn
from triode.engine.completion import Result
from triode.engine.engine import Engine

Record = Callable[[str, object], None]
"""pytest's `record_property`: what it is told stands at the end of the run's output."""
_salts = itertools.count()


@dataclass(frozen=True, kw_only=True)
class Scale:
    """An engine, and how much is asked of it."""

    settings: dict[str, Any]
    prompt_tokens: int
    new_tokens: int
    chunks: tuple[int, ...]
    """Most tokens of a step."""
    neighbours: tuple[int, ...]
    executors: tuple[str, ...]
    num_repeats: int
    num_lives: int
    """Requests that are cancelled."""
    num_watched: int
    """Requests that must not notice."""

    def open(self, **changes: Any) -> AbstractAsyncContextManager[Engine]:
        """An engine with some other settings."""
        return triode.open_engine(**{**self.settings, **changes})

    @property
    def prompt(self) -> list[int]:
        return [(7919 * index + 11) % 40_000 for index in range(self.prompt_tokens)]

    @property
    def max_running(self) -> int:
        return int(self.settings["max_running"])


SMALL_ON_CPU = Scale(
    settings={
        "model": "random:tiny",
        "device": "cpu",
        "dtype": "float32",
        "executor": "thread",
        "max_context_tokens": 1024,
        "max_running": 8,
        "max_step_tokens": 128,
        "kv_cache_bytes": 2**22,
    },
    prompt_tokens=70,
    new_tokens=8,
    chunks=(17,),
    neighbours=(6,),
    executors=(),
    num_repeats=1,
    num_lives=40,
    num_watched=3,
)


def on_gpu(model: str) -> Scale:
    """The scale of the proof itself."""
    return Scale(
        settings={
            "model": model,
            "device": "cuda",
            "dtype": "bfloat16",
            "executor": "thread",
            "max_context_tokens": 8192,
            "max_running": 256,
            "max_step_tokens": 4096,
            "kv_cache_bytes": 8 * 2**30,
        },
        prompt_tokens=4500,
        new_tokens=24,
        chunks=(64, 512, 4096),
        neighbours=(64, 255),
        executors=("thread", "process"),
        num_repeats=20,
        num_lives=2000,
        num_watched=64,
    )


HALF_BILLION, SEVEN_BILLION = "random:qwen2.5-0.5b", "random:qwen2.5-7b"
scales = pytest.mark.parametrize(
    "scale",
    [
        pytest.param(SMALL_ON_CPU, id="in small on the CPU"),
        *(pytest.param(on_gpu(model), id=model, marks=pytest.mark.gpu) for model in (HALF_BILLION, SEVEN_BILLION)),
    ],
)


def new_salt() -> str:
    """Of a request that shall find nothing in the prefix cache."""
    return f"salt {next(_salts)}"


def scored(num_tokens: int) -> triode.SamplingParams:
    """Drawn tokens, with everything that is known of their probabilities."""
    return drawn(num_tokens, top_p=0.95, logprobs=5)


def bits(result: Result) -> object:
    """Tokens and the very floats of their logprobs. NaN is equal to nothing."""
    return [(completion.token_ids, completion.logprobs) for completion in result.completions]
