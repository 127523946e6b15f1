"""Conversation: chat messages with what else a chat template may use."""

import msgspec


class Conversation(msgspec.Struct, frozen=True):
    """A prompt that the model's chat template makes into text.

    A plain list of messages means the same as a Conversation of it.
    """

    messages: tuple[dict[str, object], ...]
    """In OpenAI's shape: `{"role": ..., "content": ...}`."""
    tools: tuple[dict[str, object], ...] = ()
    """What the model may call, in OpenAI's shape: `{"type": "function", "function": {"name": ..., ...}}`."""
    options: dict[str, object] = {}
    """Variables of the template's own, as `{"enable_thinking": False}`. A template does not say which it knows."""
