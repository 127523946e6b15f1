"""Tools as clients of chat completions send them."""

from typing import Annotated, Literal

import msgspec

Name = Annotated[str, msgspec.Meta(pattern="^[a-zA-Z0-9_.-]{1,64}$")]


class Function(msgspec.Struct, forbid_unknown_fields=True):
    """What the model may call."""

    name: Name
    description: str | None = None
    parameters: dict[str, object] | None = None
    """A JSON schema of the arguments; null takes none."""
    strict: bool | None = None
    """Whether the arguments of every call must validate. Those of a call that was asked for always do. Such objects have at
    most some 50 optional properties."""


class Tool(msgspec.Struct, forbid_unknown_fields=True):
    """One tool."""

    type: Literal["function"]
    function: Function


class FunctionName(msgspec.Struct, forbid_unknown_fields=True):
    """One function, by its name."""

    name: str


class NamedChoice(msgspec.Struct, forbid_unknown_fields=True, tag_field="type", tag="function"):
    """Call this function."""

    function: FunctionName


class AllowedTools(msgspec.Struct, forbid_unknown_fields=True):
    """Some of the request's functions."""

    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedChoice], msgspec.Meta(min_length=1)]


class AllowedChoice(msgspec.Struct, forbid_unknown_fields=True, tag_field="type", tag="allowed_tools"):
    """Call one of these functions, or with mode "auto" answer; the model is shown no others."""

    allowed_tools: AllowedTools


ToolChoice = Literal["auto", "none", "required"] | NamedChoice | AllowedChoice
