"""Sends a load to any server that speaks as OpenAI's does, and notes when the answers come."""

from collections.abc import Sequence
from time import perf_counter

import httpx
import msgspec
import trio

from triode.engine.cli.bench.serving.figures import Heard
from triode.engine.cli.bench.serving.load import Load, Question, questions
from triode.errors import AccessDenied, ServerUnreachable
from triode.models.progress import Progress


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: msgspec.Raw | None = None


_CHUNK = msgspec.json.Decoder(_Chunk)


class Target:
    """One server, and how to ask it."""

    def __init__(self, client: httpx.AsyncClient, model: str, *, is_chat: bool, ignore_eos: bool) -> None:
        self.model = model
        self._client = client
        self._is_chat = is_chat
        self._ignore_eos = ignore_eos

    async def ask(self, question: Question, heard: Heard, began_at_s: float) -> None:
        """Send one request, and listen to its end."""
        try:
            async with self._client.stream("POST", self._path, json=self._body(question)) as response:
                if response.status_code != 200:
                    heard.failure = f"{response.status_code}: {(await response.aread()).decode(errors='replace')[:200]}"
                    return
                async for line in response.aiter_lines():
                    if line.startswith("data: {"):
                        self._hear(_CHUNK.decode(line[6:]), heard, perf_counter() - began_at_s)
            if heard.output_tokens == 0 and heard.failure is None:
                heard.failure = "no usage was told"
        except (httpx.HTTPError, msgspec.DecodeError) as error:
            heard.failure = f"{type(error).__name__}: {error}"
        finally:
            heard.last_at_s = heard.last_at_s or perf_counter() - began_at_s

    def _hear(self, chunk: _Chunk, heard: Heard, now_s: float) -> None:
        if chunk.error is not None:
            heard.failure = bytes(chunk.error).decode()
        for choice in chunk.choices:
            delta = choice.delta
            if choice.text or (delta is not None and (delta.content or delta.reasoning_content)):
                heard.first_at_s = heard.first_at_s or now_s
                heard.last_at_s = now_s
        if chunk.usage is not None:
            heard.prompt_tokens, heard.output_tokens = chunk.usage.prompt_tokens, chunk.usage.completion_tokens

    @property
    def _path(self) -> str:
        return "chat/completions" if self._is_chat else "completions"

    def _body(self, question: Question) -> dict[str, object]:
        prompt: dict[str, object] = {"prompt": question.prompt}
        if self._is_chat:
            prompt = {"messages": [{"role": "user", "content": question.prompt}]}
        body: dict[str, object] = {
            **prompt,
            "model": self.model,
            "max_tokens": question.max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        return body | ({"ignore_eos": True} if self._ignore_eos else {})


async def first_model(client: httpx.AsyncClient) -> str:
    """What the server calls its model.

    Raises:
        ServerUnreachable: if it does not answer, or not with a list of models.
        AccessDenied: if the key is missing or wrong.
    """
    try:
        answer = await client.get("models")
    except httpx.HTTPError as error:
        raise ServerUnreachable(f"{client.base_url} cannot be reached: {error}") from error
    if answer.status_code in (401, 403):
        raise AccessDenied(f"{client.base_url} answered {answer.status_code}: {answer.text[:200]}")
    try:
        name: str = answer.json()["data"][0]["id"]
    except (ValueError, LookupError, TypeError):
        raise ServerUnreachable(f"{client.base_url}models lists no model: {answer.text[:200]}") from None
    return name


async def run_load(target: Target, load: Load, progress: Progress) -> Sequence[Heard]:
    """Send all of it, and wait for the last answer."""
    progress.stage(f"serve, {load.name}", load.num_requests, "requests")
    all_heard: list[Heard] = []
    began_at_s = perf_counter()
    slots = trio.Semaphore(load.concurrency or load.num_requests)

    async def ask(question: Question, heard: Heard) -> None:
        await target.ask(question, heard, began_at_s)
        slots.release()
        progress.advance(1)

    async with trio.open_nursery() as nursery:
        for question in questions(load):
            await trio.sleep(max(0.0, question.due_at_s - (perf_counter() - began_at_s)))
            await slots.acquire()
            due_at_s = question.due_at_s if load.concurrency is None else perf_counter() - began_at_s
            all_heard.append(heard := Heard(due_at_s=due_at_s))
            nursery.start_soon(ask, question, heard)
    progress.done()
    return all_heard
