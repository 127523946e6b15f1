"""From a request to what is submitted, and to the response as it begins."""

import re
import secrets
import time
from typing import NamedTuple

import msgspec

from triode.engine.server.errors import RequestError
from triode.engine.server.guides import guide_field
from triode.engine.server.nesting import check_nesting
from triode.engine.server.openai_requests import ResponseFormat, SchemaFormat
from triode.engine.server.parameters import refused, sampling_params
from triode.engine.server.replies.reader import ReplyReader
from triode.engine.server.responses.history import input_items, to_messages
from triode.engine.server.responses.objects import Response
from triode.engine.server.responses.requests import AllowedChoice, NamedChoice, ResponseRequest, TextFormat
from triode.engine.server.service import Service
from triode.engine.server.tools import requests as chat_tools
from triode.engine.server.tools.plan import plan_tools
from triode.models.conversation import Conversation
from triode.models.sampling import SamplingParams


class Prepared(NamedTuple):
    """One response, ready to be run."""

    asked: ResponseRequest
    items: tuple[dict[str, object], ...]
    """The conversation so far: what was before, and the input."""
    prompt: Conversation
    params: SamplingParams
    reader: ReplyReader | None
    guide_field: str | None
    """The client's name of what the guide was made of."""
    response: Response


def prepare(service: Service, asked: ResponseRequest, before: tuple[dict[str, object], ...]) -> Prepared:
    """Check a request as far as it can be without the engine. `before` are the items of the previous responses.

    Raises:
        RequestError: 400 or 404.
    """
    service.check_model(asked.model)
    if asked.background:
        raise refused("background", "background must be false: a response is made while its client waits for it")
    check_nesting("input", asked.input)
    items = (*before, *input_items(asked.input))
    tools = [chat_tools.Tool("function", _function(tool)) for tool in asked.tools or ()]
    plan = plan_tools(tools, _choice(asked.tool_choice), asked.parallel_tool_calls, service.replies.tool_format)
    values: dict[str, object] = {} if asked.max_output_tokens is None else {"max_tokens": asked.max_output_tokens}
    wants_logprobs = "message.output_text.logprobs" in (asked.include or ())
    if wants_logprobs:
        values["logprobs"] = asked.top_logprobs or 0
    elif asked.top_logprobs:
        raise refused("top_logprobs", 'top_logprobs must be given with include = ["message.output_text.logprobs"]')
    form = None if asked.text is None or asked.text.format is None else _format(asked.text.format)
    try:
        params = sampling_params(asked, values, form, plan)
    except RequestError as error:
        raise renamed(error) from None
    options = asked.chat_template_kwargs or {}
    try:
        # A guide holds from the first token: no reasoning comes before.
        starts_inside = params.guide is None and service.replies.prompt_opens_reasoning(options)
    except ValueError as error:
        raise refused("chat_template_kwargs", str(error)) from None
    reader = service.replies.reader(plan, starts_inside=starts_inside)
    if wants_logprobs and reader is not None:
        reason = "include must be without message.output_text.logprobs where the output may hold reasoning or calls"
        raise refused("include", reason)
    return Prepared(
        asked=asked,
        items=items,
        prompt=Conversation(to_messages(items, asked.instructions), plan.for_template, options),
        params=params,
        reader=reader,
        guide_field=None if params.guide is None else guide_field(asked.structured_outputs, plan),
        response=_begin(service, asked, params),
    )


_NAMES = {"max_tokens": "max_output_tokens", "response_format": "text", "messages": "input"}
"""What chats and the engine call what a response calls otherwise."""


def renamed(error: RequestError) -> RequestError:
    """A refusal in the words of this endpoint."""
    param = error.detail.param
    if param not in _NAMES:
        return error
    message = re.sub(rf"\b{param}\b", _NAMES[param], str(error))
    return RequestError(error.status, message, code=error.detail.code, param=_NAMES[param])


def _begin(service: Service, asked: ResponseRequest, params: SamplingParams) -> Response:
    form = asked.text.format if asked.text is not None and asked.text.format is not None else TextFormat(type="text")
    choice = asked.tool_choice
    return Response(
        id=f"resp_{secrets.token_hex(24)}",
        created_at=int(time.time()),
        model=service.model_name,
        instructions=asked.instructions,
        previous_response_id=asked.previous_response_id,
        tools=tuple(msgspec.to_builtins(tool) for tool in asked.tools or ()),
        tool_choice="auto" if choice is None else msgspec.to_builtins(choice),
        parallel_tool_calls=asked.parallel_tool_calls is not False,
        text={"format": {"type": "text"} if form.type == "text" else msgspec.to_builtins(form)},
        temperature=params.temperature,
        top_p=params.top_p,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        max_output_tokens=asked.max_output_tokens,
        metadata=asked.metadata or {},
        store=asked.store is not False,
        top_logprobs=asked.top_logprobs or 0,
    )


def _function(tool: msgspec.Struct) -> chat_tools.Function:
    fields = msgspec.structs.asdict(tool)
    fields.pop("type")
    return chat_tools.Function(**fields)


def _choice(choice: str | NamedChoice | AllowedChoice | None) -> chat_tools.ToolChoice | None:
    if isinstance(choice, NamedChoice):
        return _named(choice)
    if isinstance(choice, AllowedChoice):
        return chat_tools.AllowedChoice(chat_tools.AllowedTools(choice.mode, [*map(_named, choice.tools)]))
    return choice  # type: ignore[return-value]  # one of the words, as the decoder has checked


def _named(choice: NamedChoice) -> chat_tools.NamedChoice:
    return chat_tools.NamedChoice(chat_tools.FunctionName(choice.name))


def _format(form: TextFormat) -> ResponseFormat:
    if form.type != "json_schema":
        return ResponseFormat(form.type)
    return ResponseFormat("json_schema", SchemaFormat(form.name, form.schema, form.description, form.strict))
