"""What goes wrong, in OpenAI's shape: `{"error": {"message", "type", "param", "code"}}` and a status."""

import re
from collections.abc import Mapping

import msgspec

from triode.errors import EngineBusy, RequestUnsatisfiable, TriodeError

RETRY_AFTER = {"Retry-After": "1"}


class ErrorDetail(msgspec.Struct, frozen=True):
    """What OpenAI's clients read of an error."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(msgspec.Struct, frozen=True):
    """The body of every answer that is an error."""

    error: ErrorDetail


class RequestError(Exception):
    """A request that is answered with an error."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = headers or {}
        kind = "server_error" if status >= 500 else _TYPES.get(status, "invalid_request_error")
        self.detail = ErrorDetail(message=message, type=kind, param=param, code=code)

    def encode(self) -> bytes:
        """The body."""
        return msgspec.json.encode(ErrorBody(self.detail))


_TYPES = {429: "rate_limit_error"}


def wrong_value(error: Exception, guide: str | None = None) -> RequestError:
    """400 for a value that Triode refuses; its message begins with the parameter's name.

    `guide` is what the client calls the field that the request's guide was made of.
    """
    message = str(error)
    if guide is not None and message.startswith("guide "):
        return RequestError(400, guide + message.removeprefix("guide"), param=guide)
    found = _PATH.search(message) or _FIELD.search(message) or _NAME.match(message)
    return RequestError(400, message, param=found.group(1) if found else None)


# msgspec says where a wrong value is: "Expected `int`, got `str` - at `$.top_k`".
_PATH = re.compile(r"at `\$\.(\w+)")
# "Object contains unknown field `best`".
_FIELD = re.compile(r"^Object (?:contains unknown|missing required) field `(\w+)`")
# Triode's own messages begin with it: "top_k must be an integer >= 0, got -5".
_NAME = re.compile(r"([a-z]\w*)[\w.\[\]]* must ")


def engine_error(error: TriodeError, guide: str | None = None) -> RequestError:
    """503 for an engine that takes nothing more at the moment or at all, 400 for a request that failed because it asks for
    what cannot be had, 500 for any other failure.

    `guide` is what the client calls the field that the request's guide was made of.
    """
    if isinstance(error, EngineBusy):
        return RequestError(503, str(error), code="engine_busy", headers=RETRY_AFTER)
    code = re.sub(r"(?<!^)(?=[A-Z])", "_", type(error).__name__).lower()
    if isinstance(error, RequestUnsatisfiable):
        return RequestError(400, str(error), code=code, param=guide)
    return RequestError(503 if code == "engine_closed" else 500, str(error), code=code)
