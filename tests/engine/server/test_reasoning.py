"""Reasoning apart from answers, through the real `openai` client."""

from pathlib import Path
from typing import Any

import openai
import pytest

from scripted_models import ASKS, HERMES, SETTINGS, THINKING, TURNS, saying, write_model
from servers import Running, running
from triode.engine.server.replies.style import ReplyStyle
from triode.models.tokenizer import Tokenizer

ASK: list[Any] = [{"role": "user", "content": "Why?"}]
THOUGHT = "<think>\nLet me see.\n</think>\n\nBecause."


def ask(server: Running, **options: Any) -> tuple[str | None, str | None]:
    """Reasoning and content of the reply, which streamed and whole must have alike."""
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        options = {"model": "tiny", "messages": ASK, "max_tokens": 200, **options}
        message = client.chat.completions.create(**options).choices[0].message
        whole = getattr(message, "reasoning_content", None), message.content
        reasoning = content = ""
        for chunk in client.chat.completions.create(**options, stream=True):
            reasoning += getattr(chunk.choices[0].delta, "reasoning_content", None) or ""
            content += chunk.choices[0].delta.content or ""
    assert (reasoning, content) == (whole[0] or "", whole[1] or "")
    return whole


def test_reasoning_is_split_off_where_the_template_has_its_tags(tmp_path: Path) -> None:
    with running(write_model(tmp_path, HERMES + THINKING), SETTINGS, served_name="tiny") as server:
        assert ask(server, extra_body=saying(THOUGHT)) == ("Let me see.", "Because.")
        assert ask(server, extra_body=saying("No <think>tags</think>.")) == (None, "No <think>tags</think>.")
        assert ask(server, max_tokens=12, extra_body=saying(THOUGHT)) == ("Let", "")


@pytest.mark.parametrize(("parser", "found"), [("none", (None, THOUGHT)), ("think", ("Let me see.", "Because."))])
def test_a_flag_overrules_the_template(tmp_path: Path, parser: str, found: tuple[str, str]) -> None:
    model = write_model(tmp_path, "{{ messages[0].content }}")
    with running(model, SETTINGS, served_name="tiny", reasoning_parser=parser) as server:
        assert ask(server, extra_body=saying(THOUGHT)) == found


def test_a_reply_to_a_prompt_that_opens_the_reasoning_begins_there(tmp_path: Path) -> None:
    options = {"seed": 1, "logit_bias": {"36": 20}, "max_tokens": 8}
    with running(write_model(tmp_path, THINKING), SETTINGS, served_name="tiny") as server:
        reasoning, content = ask(server, **options)
        assert reasoning
        assert content == ""
        reasoning, content = ask(server, **options, extra_body={"chat_template_kwargs": {"enable_thinking": False}})
        assert reasoning is None
        assert content
        with server.client() as client:
            body = {"messages": ASK, "chat_template_kwargs": {"messages": []}}
            error = client.post("/v1/chat/completions", json=body).json()["error"]
    assert error["param"] == "chat_template_kwargs"
    assert "options must not name messages" in error["message"]


def test_a_prompt_is_looked_at_as_the_template_ends_it(tmp_path: Path) -> None:
    with running(write_model(tmp_path, THINKING), SETTINGS) as server:
        backend = server.engine.tokenizer.backend
    for template, opens in [(THINKING, True), (TURNS + ASKS, False), (THINKING + "</think>", False)]:
        style = ReplyStyle(Tokenizer(backend, template, {}), reasoning="auto", tools="auto")
        assert style.prompt_opens_reasoning({}) is opens
        assert not style.prompt_opens_reasoning({"enable_thinking": False})
