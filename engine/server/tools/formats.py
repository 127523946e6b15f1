"""The formats in which models call tools, and which of them a chat template speaks of."""

import json
from collections.abc import Callable, Collection
from typing import NamedTuple

from triode.engine.server.tools.hermes import CLOSING, OPENING, HermesParser
from triode.engine.server.tools.llama3 import PYTHON_TAG, Llama3Parser
from triode.engine.server.tools.parser import ToolParser


class ToolFormat(NamedTuple):
    """How calls are written."""

    make_parser: Callable[[Collection[str]], ToolParser]
    """From the names of the request's functions."""
    arguments_key: str
    before: str
    """What begins a call."""
    after: str
    between: str
    shows_special_tokens: bool
    """Whether special tokens are a part of it, so that the text must have them."""

    def opening(self, name: str) -> str:
        """A call up to its arguments, as models write it unprompted."""
        return f'{self.before}{{"name": {json.dumps(name)}, "{self.arguments_key}": '

    @property
    def closing(self) -> str:
        """A call from the end of its arguments on."""
        return "}" + self.after


FORMATS = {
    "hermes": ToolFormat(HermesParser, "arguments", f"{OPENING}\n", f"\n{CLOSING}", "\n", False),
    "llama3": ToolFormat(Llama3Parser, "parameters", "", "", "; ", True),
}
# A template that renders tools says in the prompt how to call them.
# A format may have the tags of another.
_FOREIGN = ("<function=", "<arg_key>")
_MARKS = {"hermes": (OPENING,), "llama3": (PYTHON_TAG, '"parameters": dictionary')}


def format_of(choice: str, template: str | None) -> ToolFormat | None:
    """The format by its name, or with "auto" the one that the model's chat template speaks of; None if there is none."""
    if choice != "auto":
        return FORMATS.get(choice)
    text = template or ""
    if "tools" not in text or any(mark in text for mark in _FOREIGN):
        return None
    found = (FORMATS[name] for name, marks in _MARKS.items() if any(mark in text for mark in marks))
    return next(found, None)
