"""Clients of `/v1/stream` that see every message, over the `websockets` package."""

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import msgspec
from websockets.sync.client import ClientConnection, connect
from websockets.typing import Subprotocol

from servers import Running


class Socket:
    """A client that reads and writes messages as dicts."""

    def __init__(
        self, connection: ClientConnection, encode: Callable[[Any], Any], decode: Callable[[Any], Any]
    ) -> None:
        self.connection = connection
        self._encode = encode
        self._decode = decode

    def send(self, kind: str, **fields: Any) -> None:
        self.connection.send(self._encode({"type": kind, **fields}))

    def receive(self) -> dict[str, Any]:
        message: dict[str, Any] = self._decode(self.connection.recv(timeout=30))
        return message

    def receive_kind(self, kind: str) -> dict[str, Any]:
        while (message := self.receive())["type"] != kind:
            pass
        return message

    def follow(self, *names: str) -> dict[str, list[dict[str, Any]]]:
        """The messages of each request, until all have ended."""
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
        left = set(names)
        while left:
            message = self.receive()
            found[message["id"]].append(message)
            if message["type"] in ("finished", "failed"):
                left.remove(message["id"])
        return found


CODECS: dict[str | None, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "triode.v1.json": (json.dumps, json.loads),
    "triode.v1.msgpack": (msgspec.msgpack.encode, msgspec.msgpack.decode),
    None: (json.dumps, json.loads),
}


def open_socket(
    server: Running, protocol: str | None = "triode.v1.json", **options: Any
) -> AbstractContextManager[ClientConnection]:
    headers = {"Authorization": "Bearer secret", **options.pop("headers", {})}
    protocols = None if protocol is None else [Subprotocol("other"), Subprotocol(protocol)]
    url = server.url.replace("http", "ws") + "/v1/stream"
    opening: AbstractContextManager[ClientConnection] = connect(
        url, subprotocols=protocols, additional_headers=headers, proxy=None, **options
    )
    return opening


def text_of(messages: list[dict[str, Any]], index: int = 0) -> str:
    samples = [sample for message in messages if message["type"] == "delta" for sample in message["samples"]]
    return "".join(sample["text"] for sample in samples if sample["index"] == index)
