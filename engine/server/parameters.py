"""From OpenAI's fields to SamplingParams, or a refusal that names the field."""

from triode.engine.server.errors import RequestError, wrong_value
from triode.engine.server.guides import guide_of
from triode.engine.server.openai_requests import (
    ChatRequest,
    CompletionRequest,
    GenerationRequest,
    ResponseFormat,
    SampledRequest,
)
from triode.engine.server.tools.plan import ToolPlan
from triode.models.sampling import SamplingParams

COMPLETION_MAX_TOKENS = 16
"""OpenAI's default for text completions; chats take the room that the prompt leaves."""

_OTHERWISE = {"logprobs", "stop", "top_k"}
_SAME = [
    name
    for name in SamplingParams.__struct_fields__
    if name in GenerationRequest.__struct_fields__ and name not in _OTHERWISE
]


def chat_params(request: ChatRequest, plan: ToolPlan) -> SamplingParams:
    """The parameters of a chat completion.

    Raises:
        RequestError: 400.
    """
    if request.top_logprobs is not None and not request.logprobs:
        raise refused("top_logprobs", "top_logprobs must be given with logprobs = true")
    if None not in (request.max_tokens, request.max_completion_tokens):
        raise refused("max_completion_tokens", "max_tokens must not be given with max_completion_tokens")
    values: dict[str, object] = {}
    if request.max_completion_tokens is not None:
        values["max_tokens"] = request.max_completion_tokens
    if request.logprobs:
        values["logprobs"] = request.top_logprobs or 0
    _check_streaming(request)
    return sampling_params(request, values, request.response_format, plan)


def completion_params(request: CompletionRequest) -> SamplingParams:
    """The parameters of a text completion.

    Raises:
        RequestError: 400.
    """
    n = 1 if request.n is None else request.n
    if request.best_of not in (None, n):
        raise refused("best_of", f"best_of must be n = {n}: more samples than asked for are not drawn")
    if request.echo and request.stream and request.logprobs is not None:
        raise refused("echo", "echo must be false with logprobs and stream: a prompt's logprobs come at its end")
    if request.suffix:
        raise refused("suffix", "suffix must be empty: filling in the middle is not supported yet")
    values: dict[str, object] = {"max_tokens": COMPLETION_MAX_TOKENS}
    if request.logprobs is not None:
        values["logprobs"] = request.logprobs
        if request.echo:
            values["prompt_logprobs"] = request.logprobs
    _check_streaming(request)
    return sampling_params(request, values, request.response_format, ToolPlan())


def _check_streaming(request: GenerationRequest) -> None:
    if request.stream_options is not None and not request.stream:
        raise refused("stream_options", "stream_options must be given with stream = true")
    if request.stream and request.prompt_logprobs is not None:
        raise refused("prompt_logprobs", "prompt_logprobs must not be given with stream = true")


def sampling_params(
    request: SampledRequest, values: dict[str, object], form: ResponseFormat | None, plan: ToolPlan
) -> SamplingParams:
    """The parameters of a request, beside `values`, whose names here differ from the request's.

    Raises:
        RequestError: 400.
    """
    values["guide"] = guide_of(form, request.structured_outputs, plan)
    if plan.form is not None and plan.form.shows_special_tokens:
        values["skip_special_tokens"] = False
    values |= {name: value for name in _SAME if (value := getattr(request, name, None)) is not None}
    if request.top_k is not None:
        values["top_k"] = 0 if request.top_k == -1 else request.top_k
    if request.stop is not None:
        values["stop"] = (request.stop,) if isinstance(request.stop, str) else request.stop
    if request.include_stop_str_in_output is not None:
        values["include_stop"] = request.include_stop_str_in_output
    try:
        return SamplingParams(**values)  # type: ignore[arg-type]  # what is not of its type was refused by the decoder
    except ValueError as error:
        raise wrong_value(error) from None


def refused(param: str, message: str) -> RequestError:
    """400 for something about one field."""
    return RequestError(400, message, param=param)
