"""GET /: a page to try the model from. It loads nothing from elsewhere, and its policy forbids that it could."""

import base64
import hashlib
import re
from functools import cache
from importlib.resources import files

from starlette.requests import Request
from starlette.responses import Response


@cache
def _page() -> tuple[str, dict[str, str]]:
    """The page and its headers."""
    page = files("triode.engine.server").joinpath("playground.html").read_text(encoding="utf-8")
    policy = {
        "default-src": "'none'",
        "script-src": _hash_of("script", page),
        "style-src": _hash_of("style", page),
        "img-src": "data:",
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    return page, {
        "content-security-policy": "; ".join(f"{name} {value}" for name, value in policy.items()),
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cache-control": "no-cache",
    }


def _hash_of(tag: str, page: str) -> str:
    """What the policy allows: exactly the text of the page's only element of this kind."""
    (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return f"'sha256-{digest}'"


async def playground(request: Request) -> Response:
    """The page."""
    page, headers = _page()
    return Response(page, media_type="text/html; charset=utf-8", headers=headers)
