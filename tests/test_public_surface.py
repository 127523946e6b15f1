"""What a caller may rely on: names, signatures and parameters. A change here is a change of the interface."""

import inspect
import subprocess
import sys

import msgspec
import pytest

import triode

PUBLIC_NAMES = [
    "open_engine",
    "Engine",
    "EngineConfig",
    "LLM",
    "RequestStream",
    "SamplingParams",
    "Conversation",
    "JsonSchema",
    "JsonObject",
    "Regex",
    "Choices",
    "Grammar",
    "Result",
    "Completion",
    "Delta",
    "FinishReason",
    "RequestStatus",
    "Usage",
    "EngineStatistics",
    "Report",
    "TriodeError",
    "EngineBusy",
    "EngineClosed",
    "EngineFault",
    "RequestFailed",
    "RequestUnsatisfiable",
    "InsufficientMemory",
    "MissingExtra",
    "ModelError",
    "ModelNotFound",
    "CorruptModel",
    "UnsupportedModel",
]

SAMPLING_DEFAULTS = {
    "max_tokens": None,
    "min_tokens": 0,
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "seed": None,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "no_repeat_ngram_size": 0,
    "logit_bias": None,
    "bad_words": (),
    "stop": (),
    "stop_token_ids": (),
    "include_stop": False,
    "ignore_eos": False,
    "logprobs": None,
    "prompt_logprobs": None,
    "n": 1,
    "guide": None,
    "skip_special_tokens": True,
}


def test_the_public_names_are_exactly_these() -> None:
    assert triode.__all__ == PUBLIC_NAMES


@pytest.mark.parametrize("name", PUBLIC_NAMES)
def test_every_public_name_loads_and_is_documented(name: str) -> None:
    assert inspect.getdoc(getattr(triode, name))


@pytest.mark.parametrize("use", ["import triode; triode.aio", "import triode.aio", "from triode import aio"])
def test_the_asyncio_surface_is_a_module_that_can_be_imported(use: str) -> None:
    subprocess.run([sys.executable, "-c", use], check=True, timeout=60)


def test_another_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'triode' has no attribute 'Typo'"):
        triode.Typo  # type: ignore[attr-defined]  # noqa: B018


def test_sampling_params_have_exactly_these_fields_and_defaults() -> None:
    fields = {field.name: field.default for field in msgspec.structs.fields(triode.SamplingParams)}
    assert fields == SAMPLING_DEFAULTS


def parameters(function: object) -> str:
    """The signature with defaults, without annotations."""
    assert callable(function)
    plain = [
        parameter.replace(annotation=inspect.Parameter.empty)
        for parameter in inspect.signature(function).parameters.values()
    ]
    return str(inspect.Signature(plain))


def test_signatures_are_exactly_these() -> None:
    assert parameters(triode.open_engine) == "(model, config=None, *, progress=None, **overrides)"
    assert parameters(triode.Engine.submit) == (
        "(self, prompt, params=None, *, priority=0, request_id=None, adapter=None, cache_salt=None, deadline_s=None)"
    )
