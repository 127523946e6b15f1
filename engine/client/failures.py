"""The exception that a server's error would have been in its own program."""

from triode.engine.server.bridge_messages import Failed
from triode.errors import (
    AccessDenied,
    EngineBusy,
    EngineClosed,
    EngineFault,
    RequestFailed,
    RequestUnsatisfiable,
    ServerUnreachable,
)

_BY_CODE: dict[str | None, type[Exception]] = {
    "engine_busy": EngineBusy,
    "rate_limit_exceeded": EngineBusy,
    "engine_closed": EngineClosed,
    "shutting_down": EngineClosed,
    "engine_fault": EngineFault,
    "request_failed": RequestFailed,
    "request_unsatisfiable": RequestUnsatisfiable,
    "not_resumable": ServerUnreachable,
    "invalid_api_key": AccessDenied,
}


def error_of(failed: Failed) -> Exception:
    """The failure as an exception: a call that was wrong is a ValueError."""
    kind = _BY_CODE.get(failed.error.code, ValueError if failed.status < 500 else RequestFailed)
    return kind(failed.error.message)
