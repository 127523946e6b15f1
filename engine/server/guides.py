"""From what a request says of its output to a guide."""

from collections.abc import Mapping

from triode.engine.server.errors import RequestError
from triode.engine.server.nesting import check_nesting
from triode.engine.server.openai_requests import ResponseFormat, StructuredOutputs
from triode.engine.server.tools.plan import ToolPlan
from triode.models.guide import Choices, Grammar, Guide, JsonObject, JsonSchema, Regex

_ANY_OBJECT: Mapping[str, object] = {"type": "object"}
_ONE = "structured_outputs must have exactly one of json, regex, choice, grammar, json_object"


def guide_of(form: ResponseFormat | None, outputs: StructuredOutputs | None, plan: ToolPlan) -> Guide | None:
    """What holds the output to its form, if anything does.

    Raises:
        RequestError: 400.
    """
    answer = _schema(form)
    if outputs is not None:
        if answer is not None:
            raise _refused("structured_outputs", "structured_outputs must not be given with response_format")
        if plan.choice == "required":
            raise _refused("structured_outputs", "structured_outputs must not be given where a call is asked for")
        return _structured(outputs)
    try:
        if (grammar := plan.grammar(answer)) is not None:
            return Grammar(grammar, of_schemas=True)
    except ValueError as error:
        raise _refused("tools", f"tools must have schemas that make a grammar: {error}") from None
    if answer is None:
        return None
    try:
        return JsonObject() if answer is _ANY_OBJECT else JsonSchema(answer)
    except ValueError as error:
        raise _refused("response_format", str(error)) from None


def guide_field(outputs: StructuredOutputs | None, plan: ToolPlan) -> str:
    """What the client calls the field that its guide was made of, if it has one."""
    if outputs is not None:
        return "structured_outputs"
    return "response_format" if plan.form is None else "tools"


def _schema(form: ResponseFormat | None) -> Mapping[str, object] | None:
    """The schema of the answer; None if it is text."""
    if form is None or form.type == "text":
        return None
    if form.type == "json_object":
        return _ANY_OBJECT
    if form.json_schema is None:
        raise _refused("response_format", "response_format.json_schema must be given with type json_schema")
    check_nesting("response_format", form.json_schema.schema)
    return form.json_schema.schema


def _structured(outputs: StructuredOutputs) -> Guide:
    given = [name for name in outputs.__struct_fields__ if getattr(outputs, name) not in (None, False)]
    if len(given) != 1:
        raise _refused("structured_outputs", _ONE)
    try:
        if outputs.json is not None:
            return JsonSchema(outputs.json)
        if outputs.regex is not None:
            return Regex(outputs.regex)
        if outputs.choice is not None:
            return Choices(tuple(outputs.choice))
        return JsonObject() if outputs.grammar is None else Grammar(outputs.grammar)
    except ValueError as error:
        raise _refused("structured_outputs", f"structured_outputs: {error}") from None


def _refused(param: str, message: str) -> RequestError:
    return RequestError(400, message, param=param)
