"""ServerConfig: what a server can be told besides the engine's settings."""

from typing import Literal, get_args, get_type_hints

import msgspec
from msgspec.structs import force_setattr

_OPTIONAL_LIMITS = ("max_concurrent_per_key", "max_requests_per_minute", "max_tokens_per_minute")


class ServerConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where a server listens, whom it serves and how much it takes.

    Raises:
        ValueError: at construction, for a value outside its limits.
    """

    host: str = "127.0.0.1"
    """The address to listen at; 0.0.0.0 is every network of this machine."""
    port: int = 8000
    """0 takes any free one, which the start-up report names."""
    server: Literal["uvicorn", "hypercorn"] = "uvicorn"
    """Which server runs the app: uvicorn (asyncio, several times as fast) or Hypercorn (one Trio loop with the engine)."""
    served_name: str | None = None
    """What clients call the model; None takes MODEL as it was given."""
    api_keys: tuple[str, ...] = ()
    """A key that clients may show; without any, everybody is served. The environment hides it from `ps`."""
    allowed_origins: tuple[str, ...] = ()
    """A web origin whose pages may call from browsers, or * for all; by default only the server's own."""
    tls_certificate: str | None = None
    """A PEM file with the certificate chain; serves HTTPS."""
    tls_key: str | None = None
    """A PEM file with the certificate's key."""
    max_body_bytes: int = 8 * 2**20
    """The largest request body or WebSocket message."""
    reasoning_parser: Literal["auto", "none", "think"] = "auto"
    """What splits a reply's reasoning from its answer: <think> tags, always or if the chat template has them."""
    tool_parser: Literal["auto", "none", "hermes", "llama3"] = "auto"
    """The format in which the model calls tools; auto reads it off the chat template."""
    max_stored_responses: int = 1024
    """Responses of /v1/responses that can be fetched and continued; they are kept in memory."""
    max_prompts: int = 128
    """Prompts in one request at most."""
    max_concurrent_per_key: int | None = None
    """Unfinished requests of one key at most, or of everybody without a key; None sets no limit."""
    max_requests_per_minute: int | None = None
    """Requests of one key in any minute at most; None sets no limit."""
    max_tokens_per_minute: int | None = None
    """Tokens of one key, in and out, in a minute; whoever has used more waits. None sets no limit."""
    max_resume_grace_s: float = 60.0
    """The longest that a request on /v1/stream may ask to go on without a socket; 0 lets none."""
    header_timeout_s: float = 20.0
    """A request's headers may take so long, and under Hypercorn, which knows no difference, the next request."""
    body_timeout_s: float = 60.0
    """A request's body may take so long."""
    write_timeout_s: float = 10.0
    """A client that takes nothing for so long is dropped, and its requests are cancelled."""
    drain_s: float = 30.0
    """After SIGTERM, unfinished requests may go on for so long."""
    playground: bool = True
    """Show a page at / from which the model can be tried; it asks for a key if one is needed."""
    log_requests: bool = True
    """Log a line for every request; texts are never logged."""
    log_format: Literal["text", "json"] = "text"
    """Lines for people, or a JSON object a line."""
    tracing: bool = False
    """Make an OpenTelemetry span of every request; needs triode[otel]."""
    otlp_endpoint: str | None = None
    """Where spans go, as http://localhost:4318/v1/traces; turns tracing on."""

    def __post_init__(self) -> None:
        for name in ("api_keys", "allowed_origins"):
            force_setattr(self, name, tuple(getattr(self, name)))
        if any(not key or not key.isascii() or not key.isprintable() for key in self.api_keys):
            raise ValueError("api_keys must be non-empty printable ASCII, got one that is not")
        for name in ("reasoning_parser", "tool_parser"):
            allowed = get_args(get_type_hints(type(self))[name])
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if type(self.port) is not int or not 0 <= self.port < 2**16:
            raise ValueError(f"port must be an integer >= 0 and < 65536, got {self.port!r}")
        for name in ("max_body_bytes", "max_prompts", "max_stored_responses", *_OPTIONAL_LIMITS):
            value = getattr(self, name)
            if not (value is None and name in _OPTIONAL_LIMITS) and (type(value) is not int or value < 1):
                raise ValueError(f"{name} must be an integer >= 1, got {value!r}")
        for name, choices in (("server", ("uvicorn", "hypercorn")), ("log_format", ("text", "json"))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        if self.otlp_endpoint is not None:
            force_setattr(self, "tracing", True)
        for name in ("header_timeout_s", "body_timeout_s", "write_timeout_s"):
            if not 0 < getattr(self, name) <= 3600:
                raise ValueError(f"{name} must be > 0 and <= 3600, got {getattr(self, name)!r}")
        for name in ("drain_s", "max_resume_grace_s"):
            if not 0 <= getattr(self, name) <= 86_400:
                raise ValueError(f"{name} must be >= 0 and <= 86400, got {getattr(self, name)!r}")
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("tls_certificate and tls_key must be given together")
        if self.served_name == "":
            raise ValueError("served_name must not be empty")
