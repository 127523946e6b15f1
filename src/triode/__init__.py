"""Triode: an LLM inference engine for async Python.

    async with triode.open_engine("smollm2-135m") as engine:
        stream = await engine.submit("Why is the sky blue?", triode.SamplingParams(max_tokens=64))
        async for delta in stream:
            print(delta.text, end="")

Names load on first use: `import triode` itself imports neither Trio nor torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from triode import aio as aio
    from triode.actors.messages import Delta, FinishReason, RequestStatus
    from triode.engine.blocking import LLM
    from triode.engine.completion import Completion, Result, Usage
    from triode.engine.config import EngineConfig
    from triode.engine.engine import Engine, open_engine
    from triode.engine.parts import Report
    from triode.engine.statistics import EngineStatistics
    from triode.engine.stream import RequestStream
    from triode.errors import (
        CorruptModel,
        EngineBusy,
        EngineClosed,
        EngineFault,
        InsufficientMemory,
        MissingExtra,
        ModelError,
        ModelNotFound,
        RequestFailed,
        RequestUnsatisfiable,
        TriodeError,
        UnsupportedModel,
    )
    from triode.models.conversation import Conversation
    from triode.models.guide import Choices, Grammar, JsonObject, JsonSchema, Regex
    from triode.models.sampling import SamplingParams
else:

    def __getattr__(name):
        if name == "aio":
            return import_module("triode.aio")
        if (module := _HOMES.get(name)) is None:
            raise AttributeError(f"module 'triode' has no attribute {name!r}")
        return getattr(import_module(module), name)


_HOMES = {
    "LLM": "triode.engine.blocking",
    "Choices": "triode.models.guide",
    "Completion": "triode.engine.completion",
    "Conversation": "triode.models.conversation",
    "CorruptModel": "triode.errors",
    "Delta": "triode.actors.messages",
    "Engine": "triode.engine.engine",
    "EngineBusy": "triode.errors",
    "EngineClosed": "triode.errors",
    "EngineConfig": "triode.engine.config",
    "EngineFault": "triode.errors",
    "EngineStatistics": "triode.engine.statistics",
    "FinishReason": "triode.actors.messages",
    "Grammar": "triode.models.guide",
    "InsufficientMemory": "triode.errors",
    "JsonObject": "triode.models.guide",
    "JsonSchema": "triode.models.guide",
    "MissingExtra": "triode.errors",
    "ModelError": "triode.errors",
    "ModelNotFound": "triode.errors",
    "Regex": "triode.models.guide",
    "Report": "triode.engine.parts",
    "RequestFailed": "triode.errors",
    "RequestStatus": "triode.actors.messages",
    "RequestStream": "triode.engine.stream",
    "RequestUnsatisfiable": "triode.errors",
    "Result": "triode.engine.completion",
    "SamplingParams": "triode.models.sampling",
    "TriodeError": "triode.errors",
    "UnsupportedModel": "triode.errors",
    "Usage": "triode.engine.completion",
    "open_engine": "triode.engine.engine",
}

__all__ = [  # noqa: RUF022 - the public surface, sorted by what a reader looks for first
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
