"""Tiny models whose chat templates know tools or reasoning. A guide of one choice makes them say anything."""

import json
from pathlib import Path
from typing import Any

from model_files import write_tiny_gguf

TURNS = (
    "{%- for message in messages %}[{{ message.role }}]"
    "{%- if message.reasoning_content %}<think>{{ message.reasoning_content }}</think>{% endif %}"
    "{{- message.content or '' }}"
    "{%- for call in message.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}"
    "{%- endfor %}"
)
ASKS = "{%- if add_generation_prompt %}[assistant]{% endif %}"
HERMES = "{%- if tools %}[tools]{{ tools | tojson }} Call in <tool_call> tags.{% endif %}" + TURNS + ASKS
LLAMA3 = "{%- if tools %}[tools]{{ tools | tojson }} Call after <|python_tag|>.{% endif %}" + ASKS
THINKING = TURNS + ASKS + "{%- if add_generation_prompt and enable_thinking is not false %}<think>\n{% endif %}"
"""The prompt opens the reasoning. HERMES' reply may, if the server is told to look."""

SETTINGS: dict[str, Any] = {"kv_cache_bytes": 2**25, "max_step_tokens": 256}

LONG_TOKENS = 15_000
"""Of a reply that no test waits for."""


def write_model(folder: Path, template: str) -> str:
    """A model of bytes with a context of 16,384."""
    changes: dict[str, Any] = {"tokenizer.chat_template": template, "llama.context_length": 16_384}
    return str(write_tiny_gguf(folder / "model.gguf", "llama", **changes))


def saying(text: str) -> dict[str, Any]:
    """Fields of a request whose reply is this text."""
    return {"structured_outputs": {"choice": [text]}}


def call_of(name: str, arguments: object) -> str:
    """A call in Hermes' format."""
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"
