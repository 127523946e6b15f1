"""The optional dependencies of serving."""

from importlib.util import find_spec

from triode.errors import MissingExtra

_NEEDED = ("starlette", "uvicorn", "httptools", "websockets", "prometheus_client")


def require_extra() -> None:
    """Check that serving can be imported.

    Raises:
        MissingExtra: naming what is missing and how to get it.
    """
    if missing := [name for name in _NEEDED if find_spec(name) is None]:
        raise MissingExtra(f"serving needs {', '.join(missing)}: pip install 'triode[serve]'")
