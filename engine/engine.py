"""open_engine and Engine: Triode inside your own Trio program.

async with triode.open_engine("smollm2-135m") as engine:
    stream = await engine.submit("Why is the sky blue?")
    async for delta in stream:
        print(delta.text, end="")
"""

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import TypeVar

import trio

from triode.actors.mailbox import Mailbox, TrioWaker
from triode.actors.messages import Clear, Pin, RequestStatus, Unpin
from triode.actors.scheduler.admission import namespace_of
from triode.actors.tokenizer.prepare import encode
from triode.engine.batch import check_prompts, params_for_each, run_batch
from triode.engine.completion import Result
from triode.engine.config import EngineConfig
from triode.engine.hub import Hub
from triode.engine.lifetime import run_hub
from triode.engine.loading import load
from triode.engine.parts import EngineParts, Report
from triode.engine.request import (
    Prompt,
    Request,
    build_request,
    check_cache_salt,
    check_request_id,
    embedding_request,
    freeze_prompt,
)
from triode.engine.statistics import EngineStatistics
from triode.engine.stream import RequestStream
from triode.engine.submission import Submission
from triode.errors import EngineBusy
from triode.ids import RequestId, TokenId
from triode.models.progress import NullProgress, Progress
from triode.models.sampling import SamplingParams
from triode.models.tokenizer import Tokenizer

T = TypeVar("T")


@asynccontextmanager
async def open_engine(
    model: str, config: EngineConfig | None = None, *, progress: Progress | None = None, **overrides: object
) -> AsyncIterator["Engine"]:
    """Load a model and serve it until the block is left.

    Leaving the block cancels what is unfinished. Exceptions of the block leave it bare.

    Args:
        model: a folder, a `.gguf` file, a Hugging Face id, a built-in alias (`smollm2-135m`) or `random:NAME`.
        config: settings; the defaults fit the machine.
        progress: is told about long steps of loading.
        overrides: single settings by name, e.g. `max_running=8`.

    Raises:
        ValueError: for a setting that does not exist or is outside its limits.
        ModelError: if the model cannot be loaded.
        InsufficientMemory: if it does not fit.
        EngineFault: if a bug or a device fault ended the engine; its cause is attached.
    """
    resolved = (config or EngineConfig()).override({**overrides, "model": model})
    parts = await load(resolved, progress)
    async with serve(parts) as engine:
        yield engine


@asynccontextmanager
async def serve(parts: EngineParts) -> AsyncIterator["Engine"]:
    """Run an engine from loaded parts: `open_engine` without the loading."""
    async with run_hub(parts) as hub:
        yield Engine(hub)


class Engine:
    """A running engine, as its own event loop's tasks see it. Made by `open_engine`."""

    def __init__(self, hub: Hub) -> None:
        self._hub = hub
        self._waker = TrioWaker()
        self.cache = CacheControl(hub)
        """Pin, unpin and clear cached prefixes."""

    @property
    def report(self) -> Report:
        """What was loaded, and how large it is."""
        return self._hub.parts.report

    @property
    def ended_by(self) -> Exception | None:
        """Why the engine takes no more requests: EngineClosed, or the EngineFault it had; None while it runs."""
        return self._hub.ended_by

    @property
    def is_full(self) -> bool:
        """Whether as many requests are unfinished as the engine takes: `submit` would raise EngineBusy now."""
        return self._hub.is_full

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer, which may be used from any thread."""
        return self._hub.parts.tokenizer

    def submit(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        priority: int = 0,
        request_id: str | None = None,
        adapter: str | None = None,
        cache_salt: str | None = None,
        deadline_s: float | None = None,
    ) -> Submission[RequestStream]:
        """Queue a request. Await the result for its stream, or enter it with `async with`.

        Args:
            prompt: raw text, token ids, or chat messages in OpenAI's shape.
            params: how to choose tokens and when to stop; the defaults sample at temperature 1 to the end.
            priority: lower goes first; equals are served in order of arrival.
            request_id: a name of your own, unique among unfinished requests.
            adapter: not supported yet; anything but None is refused.
            cache_salt: shares cached prefixes only with requests of the same salt.
            deadline_s: cancels the request when so many seconds have passed.

        Raises (from the await):
            ValueError: if an argument is wrong or the request could never fit.
            EngineBusy: if the queue is full.
            EngineClosed: if the engine has ended.
        """
        # Before anything else: the worker takes as long to wake as a step to be planned.
        self._hub.wake()
        request = build_request(
            prompt, params, priority=priority, adapter=adapter, cache_salt=cache_salt, deadline_s=deadline_s
        )
        return Submission(self._open(request, request_id))

    async def generate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: Progress | None = None,
    ) -> list[Result]:
        """Complete many prompts, in order; as many at a time as the engine runs well.

        Where `submit` raises EngineBusy this waits: for a place in the queue, or for the guides of others.

        Args:
            prompts: texts, token ids or conversations.
            params: one for all, or one for each prompt.
            progress: is told how many are done.

        Raises:
            ValueError: for the first prompt that is refused; the others are cancelled.
        """
        each = params_for_each(prompts, params)
        requests = [
            Request(prompt=freeze_prompt(prompt), params=own) for prompt, own in zip(prompts, each, strict=True)
        ]
        return await self._run_batch(RequestStream.result, requests, progress)

    async def embed(self, prompts: Sequence[Prompt], *, pooling: str = "mean") -> list[tuple[float, ...]]:
        """One vector a prompt, as the model gives them: not scaled to length 1. Waits where `generate` does.

        Args:
            prompts: texts, token ids or conversations.
            pooling: "mean" of the final hidden states, or the "last" one.

        Raises:
            ValueError: for the first prompt that is refused, or for a text where a list of prompts is wanted.
        """
        check_prompts(prompts)
        requests = [embedding_request(prompt, pooling) for prompt in prompts]
        return await self._run_batch(RequestStream.embedding, requests, None)

    async def encode(self, prompt: Prompt) -> tuple[TokenId, ...]:
        """The tokens of a prompt, as `submit` would see them: conversations go through the chat template.

        Raises:
            ValueError: if the prompt is wrong or could never fit.
        """
        parts = self._hub.parts
        return (await trio.to_thread.run_sync(encode, freeze_prompt(prompt), parts.tokenizer, parts.limits)).token_ids

    def status(self, request_id: str) -> RequestStatus:
        """Where a request is; the last 4,096 that ended are remembered.

        Raises:
            KeyError: if the id is unknown.
        """
        return self._hub.status(RequestId(request_id))

    def cancel(self, request_id: str) -> None:
        """Cancel by id; a request that has ended, or is unknown, is left alone."""
        if mailbox := self._hub.mailboxes.get(RequestId(request_id)):
            self._hub.cancel(mailbox)

    def set_priority(self, request_id: str, priority: int) -> None:
        """Move a request in the order of service. Lower goes first.

        Raises:
            KeyError: if no unfinished request has this id.
            ValueError: if the priority is no integer.
        """
        self._hub.set_priority(RequestId(request_id), priority)

    def statistics(self) -> EngineStatistics:
        """The load at this moment, actor by actor."""
        return self._hub.statistics()

    async def _run_batch(
        self,
        read: Callable[[RequestStream], Awaitable[T]],
        requests: Sequence[Request],
        progress: Progress | None,
    ) -> list[T]:
        limits = self._hub.parts.config.scheduler
        # Twice as many as run, so that a free slot never waits for the next prompt to be tokenized.
        max_under_way = min(2 * limits.max_running, limits.max_queued)
        return await run_batch(self._open_when_possible, read, requests, max_under_way, progress or NullProgress())

    async def _open_when_possible(self, request: Request) -> RequestStream:
        while True:
            num_released = self._hub.num_released_guides
            await self._hub.wait_for_place()
            try:
                return await self._open(request, None)
            except EngineBusy:
                # There was a place in the queue, so it is the guide that found none.
                await self._hub.wait_for_guide(num_released)

    async def _open(self, request: Request, request_id: str | None) -> RequestStream:
        name = self._hub.new_request_id() if request_id is None else check_request_id(request_id)
        mailbox = Mailbox(name, request.params.n, self._waker)
        self._hub.submit(mailbox, request)
        return await RequestStream(mailbox, self._hub.cancel, self._hub.cancel_soon).accepted()


class CacheControl:
    """What may be asked of the prefix cache."""

    def __init__(self, hub: Hub) -> None:
        self._hub = hub

    async def pin(self, prompt: Prompt, *, cache_salt: str | None = None) -> int:
        """Keep the cached full blocks of a prompt until `unpin`. Returns how many tokens they hold."""
        check_cache_salt(cache_salt)
        token_ids, namespace = await self._encode(prompt), namespace_of(cache_salt)
        return await self._ask(lambda name: Pin(name, token_ids, namespace, trio.current_time()))

    async def unpin(self, prompt: Prompt, *, cache_salt: str | None = None) -> int:
        """Undo one `pin` of the same prompt. Returns how many tokens it held."""
        check_cache_salt(cache_salt)
        token_ids, namespace = await self._encode(prompt), namespace_of(cache_salt)
        return await self._ask(lambda name: Unpin(name, token_ids, namespace, trio.current_time()))

    async def clear(self) -> int:
        """Forget what is cached, but for what is pinned or in use. Returns how many tokens that were."""
        return await self._ask(Clear)

    async def _encode(self, prompt: Prompt) -> tuple[TokenId, ...]:
        parts = self._hub.parts
        return (await trio.to_thread.run_sync(encode, freeze_prompt(prompt), parts.tokenizer, parts.limits)).token_ids

    async def _ask(self, question: Callable[[RequestId], Pin | Unpin | Clear]) -> int:
        send, receive = trio.open_memory_channel[int | Exception](1)
        self._hub.ask_cache(question, send.send_nowait)
        answer = await receive.receive()
        if isinstance(answer, Exception):
            raise answer
        return answer
