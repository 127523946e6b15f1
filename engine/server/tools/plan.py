"""What one request's tools come to: what the template is shown, how calls are read, and what forces them."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import msgspec

from triode.engine.server.errors import RequestError
from triode.engine.server.nesting import check_nesting
from triode.engine.server.tools.formats import ToolFormat
from triode.engine.server.tools.grammar import calls_and_text, calls_only, calls_or_answer
from triode.engine.server.tools.parser import ToolParser
from triode.engine.server.tools.requests import AllowedChoice, Function, NamedChoice, Tool, ToolChoice

MAX_TOOLS = 128


class ToolPlan(NamedTuple):
    """The tools of one request. Without tools, the plan of a request that has none."""

    functions: Sequence[Function] = ()
    form: ToolFormat | None = None
    choice: str = "none"
    """auto or required; of a named function, required of it alone."""
    parallel: bool = True
    shown: Sequence[Function] = ()
    """All functions, which the model sees also where it must call a certain one."""

    @property
    def for_template(self) -> tuple[dict[str, object], ...]:
        """The tools as a chat template wants them."""
        return tuple(
            {"type": "function", "function": {key: value for key, value in fields.items() if value is not None}}
            for function in self.shown
            if isinstance(fields := msgspec.to_builtins(function), dict)
        )

    def parser(self) -> ToolParser | None:
        """Reads one reply; None where calls are not looked for."""
        return None if self.form is None else self.form.make_parser([function.name for function in self.functions])

    def grammar(self, answer: Mapping[str, object] | None) -> str | None:
        """What holds the output to calls that are valid, and else to `answer`, a JSON schema. None lets it be."""
        if self.form is None:
            return None
        if self.choice == "required":
            return calls_only(self.form, self.functions, parallel=self.parallel)
        if answer is not None:
            return calls_or_answer(self.form, self.functions, answer, parallel=self.parallel)
        if self.parallel and not any(function.strict for function in self.functions):
            return None
        return calls_and_text(self.form, self.functions, parallel=self.parallel)


def plan_tools(
    tools: Sequence[Tool] | None, choice: ToolChoice | None, parallel: bool | None, form: ToolFormat | None
) -> ToolPlan:
    """What a request's tools come to with a model that calls in `form`.

    Raises:
        RequestError: 400.
    """
    if not tools:
        if choice not in (None, "none", "auto"):
            raise RequestError(400, "tool_choice must be none or auto without tools", param="tool_choice")
        return ToolPlan()
    functions = [tool.function for tool in tools]
    if len({function.name for function in functions}) < len(functions):
        raise RequestError(400, "tools must have names that differ", param="tools")
    if len(functions) > MAX_TOOLS:
        raise RequestError(400, f"tools must be <= {MAX_TOOLS}, got {len(functions)}", param="tools")
    check_nesting("tools", [function.parameters for function in functions])
    if choice == "none":
        return ToolPlan()
    if form is None:
        raise RequestError(
            400,
            "tools must be empty: the model's chat template has none, and tool_parser names no format",
            param="tools",
        )
    parallel = parallel is not False
    if isinstance(choice, NamedChoice):
        return ToolPlan(_named(functions, [choice]), form, "required", False, functions)
    if isinstance(choice, AllowedChoice):
        allowed = _named(functions, choice.allowed_tools.tools)
        return ToolPlan(allowed, form, choice.allowed_tools.mode, parallel, allowed)
    return ToolPlan(functions, form, choice or "auto", parallel, functions)


def _named(functions: Sequence[Function], choices: Sequence[NamedChoice]) -> list[Function]:
    """The functions of these names, in the tools' order.

    Raises:
        RequestError: 400.
    """
    names = [choice.function.name for choice in choices]
    known = {function.name for function in functions}
    if wrong := [name for name in names if name not in known]:
        raise RequestError(400, f"tool_choice must name one of the tools, got {wrong[0]!r}", param="tool_choice")
    return [function for function in functions if function.name in names]
