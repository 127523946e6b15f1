"""POST /v1/completions."""

from collections.abc import Sequence
from typing import cast

import msgspec
from msgspec import UNSET, structs
from starlette.requests import Request
from starlette.responses import Response

from triode.actors.messages import Delta, FinishReason
from triode.engine import completion
from triode.engine.completion import Completion, Result
from triode.engine.request import Prompt
from triode.engine.server.connection import Writer, decode, read_body
from triode.engine.server.dialect import head, usage_of
from triode.engine.server.echo import Echo, echo_of, with_prompt
from triode.engine.server.generation import Generation, Job
from triode.engine.server.logprobs import prompt_logprobs, text_logprobs
from triode.engine.server.openai_requests import CompletionRequest
from triode.engine.server.openai_responses import TextChoice, TextChunk, TextCompletion, TextLogprobs, Usage
from triode.engine.server.parameters import completion_params, refused
from triode.engine.server.service import Service
from triode.engine.stream import RequestStream
from triode.models.sampling import SamplingParams

_DECODER = msgspec.json.Decoder(CompletionRequest)


class CompletionEndpoint:
    """Continues texts."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def create(self, request: Request) -> Response:
        """One prompt or several, `n` samples of each."""
        body = decode(await read_body(request, self._service.config.max_body_bytes), _DECODER)
        self._service.check_model(body.model)
        prompts = split_prompts("prompt", body.prompt, self._service.config.max_prompts)
        # Nothing but the prompt: one token is generated, because no request is without, and left out.
        is_prompt_only = bool(body.echo) and body.max_tokens == 0
        job = Job.of(body, prompts, completion_params(structs.replace(body, max_tokens=1) if is_prompt_only else body))
        dialect = TextDialect(self._service, job.params, is_prompt_only)
        kind = EchoedGeneration if body.echo else Generation
        return kind(self._service, job, dialect, request)


def split_prompts(name: str, prompt: str | list[str | int | list[int]], max_prompts: int) -> list[Prompt]:
    """The prompts in the field `name`: a text, token ids, or a list of one of them.

    Raises:
        RequestError: 400 if it is none of these, empty, or too many.
    """
    if isinstance(prompt, str):
        return [prompt]
    kinds = {type(item) for item in prompt}
    if len(kinds) != 1:
        raise refused(name, f"{name} must be a text, token ids, or a non-empty list of texts or of lists of token ids")
    if kinds == {int}:
        return [cast("list[int]", prompt)]
    if len(prompt) > max_prompts:
        raise refused(name, f"{name} must be <= {max_prompts} prompts, got {len(prompt)}")
    return [item for item in prompt if not isinstance(item, int)]


class TextDialect:
    """`text_completion`, whole and in chunks."""

    def __init__(self, service: Service, params: SamplingParams, is_prompt_only: bool = False) -> None:
        self._tokenizer = service.tokenizer
        self._head = head(service, "text_completion", "cmpl")
        self._params = params
        self._n = params.n
        self._is_prompt_only = is_prompt_only
        self._offsets: dict[int, int] = {}
        self.answer_id = str(self._head["id"])
        self.echoes: Sequence[Echo] = ()
        """The prompts, where they are to be repeated."""

    def opening(self, num_choices: int) -> Sequence[TextChunk]:
        """Nothing comes before the text, but for an echo."""
        echoes = enumerate(echo for echo in self.echoes for _ in range(self._n))
        return [self._chunk([TextChoice(choice, echo.text, None, None, None)]) for choice, echo in echoes]

    def chunk(self, choice: int, delta: Delta) -> TextChunk:
        """Text, its logprobs and, in the last one, why it ends."""
        logprobs = None
        if self._is_prompt_only:
            delta = structs.replace(delta, text="", logprobs=None)
        if delta.logprobs is not None:
            logprobs = text_logprobs(self._tokenizer, delta.logprobs, self._offsets.get(choice, 0))
            self._offsets[choice] = _end(logprobs, self._offsets.get(choice, 0))
        return self._chunk([TextChoice(choice, delta.text, logprobs, delta.finish_reason, delta.stop_reason)])

    def end(self, choice: int, reason: FinishReason) -> TextChunk:
        """Why the text ends."""
        return self._chunk([TextChoice(choice, "", None, reason, None)])

    def usage(self, usage: Usage) -> TextChunk:
        """The tokens of the whole request."""
        if self._is_prompt_only:
            usage = structs.replace(usage, completion_tokens=0, total_tokens=usage.prompt_tokens)
        return structs.replace(self._chunk([]), usage=usage)

    def answer(self, results: Sequence[Result]) -> TextCompletion:
        """The samples of each prompt, prompt by prompt."""
        return TextCompletion(
            **self._head,  # type: ignore[arg-type]
            choices=[
                self._choice(place, sample, result)
                for place, result in enumerate(results)
                for sample in result.completions
            ],
            usage=usage_of([self._counted(result.usage) for result in results]),
        )

    def _counted(self, usage: completion.Usage) -> completion.Usage:
        return structs.replace(usage, completion_tokens=0) if self._is_prompt_only else usage

    def _choice(self, place: int, sample: Completion, result: Result) -> TextChoice:
        scores = result.prompt_logprobs
        if self._is_prompt_only:
            sample = structs.replace(sample, text="", logprobs=None if sample.logprobs is None else ())
        text, logprobs = sample.text, None
        if self.echoes:
            text = self.echoes[place].text + text
            if sample.logprobs is not None:
                alternatives = self._params.logprobs or 0
                logprobs = with_prompt(self._tokenizer, self.echoes[place], scores or (), sample.logprobs, alternatives)
        elif sample.logprobs is not None:
            logprobs = text_logprobs(self._tokenizer, sample.logprobs, 0)
        return TextChoice(
            index=place * self._n + sample.index,
            text=text,
            logprobs=logprobs,
            finish_reason=sample.finish_reason,
            stop_reason=sample.stop_reason,
            seed=sample.seed,
            prompt_logprobs=UNSET if scores is None else prompt_logprobs(self._tokenizer, scores),
        )

    def _chunk(self, choices: list[TextChoice]) -> TextChunk:
        return TextChunk(**self._head, choices=choices)  # type: ignore[arg-type]


class EchoedGeneration(Generation):
    """Text completions that repeat their prompts."""

    _dialect: TextDialect

    async def _write(self, writer: Writer, streams: list[RequestStream]) -> None:
        """As it is, once the prompts are encoded."""
        self._dialect.echoes = [await echo_of(self._service, prompt) for prompt in self._job.prompts]
        await super()._write(writer, streams)


def _end(logprobs: TextLogprobs, start: int) -> int:
    """Where the tokens end, in characters of tokens."""
    return logprobs.text_offset[-1] + len(logprobs.tokens[-1]) if logprobs.tokens else start
