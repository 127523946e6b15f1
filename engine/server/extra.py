"""The optional dependencies of serving."""

from importlib.util import find_spec

from triode.errors import MissingExtra

_NEEDED = {
    "serve": ("starlette", "uvicorn", "uvloop", "httptools", "websockets", "prometheus_client"),
    "hypercorn": ("hypercorn",),
    "otel": ("opentelemetry",),
}


def require_extra(extra: str = "serve") -> None:
    """Check that what an extra brings can be imported.

    Raises:
        MissingExtra: naming what is missing and how to get it.
    """
    if missing := [name for name in _NEEDED[extra] if find_spec(name) is None]:
        extras = extra if extra == "serve" else f"serve,{extra}"
        raise MissingExtra(f"serving needs {', '.join(missing)}: pip install 'triode[{extras}]'")
