"""How deep JSON may be nested that a client sends to be kept, shown to a template or compiled.

The decoder lets pass almost as many levels as there may be calls on the interpreter's stack, and whoever walks through the
value later has less of it left.
"""

from triode.engine.server.errors import RequestError

MAX_LEVELS = 100


def check_nesting(param: str, value: object) -> None:
    """Refuse what is nested too deeply.

    Raises:
        RequestError: 400.
    """
    level, found = 0, [value]
    while found := [inner for outer in found for inner in _inside(outer)]:
        level += 1
        if level > MAX_LEVELS:
            raise RequestError(400, f"{param} must be nested <= {MAX_LEVELS} levels", param=param)


def _inside(value: object) -> list[object]:
    if isinstance(value, dict):
        return list(value.values())
    return list(value) if isinstance(value, (list, tuple)) else []
