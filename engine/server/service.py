"""What every endpoint of one app shares."""

import hashlib
import time
from collections.abc import Callable
from functools import cached_property
from typing import TypeVar

import anyio
import anyio.to_thread

import triode
from triode.engine.parts import Report
from triode.engine.server.config import ServerConfig
from triode.engine.server.errors import RequestError
from triode.engine.server.gate import Gate
from triode.engine.server.metrics import Metrics
from triode.engine.server.replies.style import ReplyStyle
from triode.engine.server.served import ServedEngine
from triode.engine.server.tracing import Tracing

T = TypeVar("T")

MAX_TEXT_IN_LOOP = 16_384
"""Longer texts are encoded in a worker thread, so that nobody's stream waits for them."""


class Service:
    """One engine as it is served."""

    def __init__(self, engine: ServedEngine, config: ServerConfig) -> None:
        self.engine = engine
        self.config = config
        self.model_name = config.served_name or engine.report.model
        self.tokenizer = engine.tokenizer
        self.replies = ReplyStyle(engine.tokenizer, reasoning=config.reasoning_parser, tools=config.tool_parser)
        self.gate = Gate(config)
        self.tracing = Tracing(self.model_name) if config.tracing else None
        self.metrics = Metrics(engine, self.model_name, self.tracing)
        self.created_s = int(time.time())
        self.fingerprint = _fingerprint(engine.report)

    def check_model(self, name: str | None) -> None:
        """A request may leave the model out; if it names one, it must be this one.

        Raises:
            RequestError: 404.
        """
        if name is not None and name != self.model_name:
            message = f"model must be {self.model_name!r}, the model served here, got {name!r}"
            raise RequestError(404, message, code="model_not_found", param="model")

    async def apart(self, size: int, call: Callable[[], T]) -> T:
        """Do something with a text of `size`, in a worker thread if it is long."""
        if size <= MAX_TEXT_IN_LOOP:
            return call()
        return await anyio.to_thread.run_sync(call, limiter=self._encoding)

    @cached_property
    def _encoding(self) -> anyio.CapacityLimiter:
        # One at a time: a thread that encodes uses every core it can get.
        return anyio.CapacityLimiter(1)


def _fingerprint(report: Report) -> str:
    """Equal requests with equal seeds have equal answers where this is equal."""
    kernel_set = f"{report.model} {report.device} {report.dtype} {report.kernels}"
    return f"triode-{triode.__version__}-{hashlib.sha256(kernel_set.encode()).hexdigest()[:8]}"
