"""How messages of `/v1/stream` are written, by subprotocol."""

from collections.abc import Callable
from dataclasses import dataclass

import msgspec
from starlette.types import Message

from triode.engine.server.bridge_messages import FromClient, FromServer, Id


class Named(msgspec.Struct):
    """What a frame that is no message may still have of one: enough to tell whose request it was for."""

    type: str
    id: Id


@dataclass(frozen=True, slots=True)
class Codec:
    """How one subprotocol writes messages."""

    frame: str
    """The key of ASGI's message: text or bytes."""
    encode: Callable[[FromServer], bytes]
    decode: Callable[[bytes], FromClient]
    decode_name: Callable[[bytes], Named]

    def to_frame(self, message: FromServer) -> Message:
        """A message as ASGI sends it."""
        data = self.encode(message)
        return {"type": "websocket.send", self.frame: data.decode() if self.frame == "text" else data}


JSON = Codec(
    "text",
    msgspec.json.Encoder().encode,
    msgspec.json.Decoder(FromClient).decode,
    msgspec.json.Decoder(Named).decode,
)
_MSGPACK = Codec(
    "bytes",
    msgspec.msgpack.Encoder().encode,
    msgspec.msgpack.Decoder(FromClient).decode,
    msgspec.msgpack.Decoder(Named).decode,
)
SUBPROTOCOLS = {"triode.v1.json": JSON, "triode.v1.msgpack": _MSGPACK}
"""The first of the client's that is among these is taken; a client that names none gets JSON."""
