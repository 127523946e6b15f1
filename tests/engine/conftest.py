"""Engines of tests share one tokenizer: reading it takes most of an engine's start. It can be held still."""

import threading
from collections.abc import Iterator
from functools import cache

import msgspec
import pytest

from engines import note_strangers
from triode.actors.tokenizer.actor import LONG_PROMPT_BYTES
from triode.models import loader
from triode.models.config import ModelOptions
from triode.models.progress import Progress
from triode.models.tokenizer import Tokenizer

_open_checkpoint = loader.open_checkpoint


@cache
def _opened(options: bytes) -> loader.Checkpoint:
    return _open_checkpoint(msgspec.json.decode(options, type=ModelOptions))


def _opened_before(options: ModelOptions, progress: Progress | None = None) -> loader.Checkpoint:
    return _opened(msgspec.json.encode(options))


@pytest.fixture(scope="module", autouse=True)
def _threads_of_other_files_are_known() -> None:
    note_strangers()


@pytest.fixture(scope="module", autouse=True)
def _checkpoints_are_opened_once() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loader, "open_checkpoint", _opened_before)
        yield


@pytest.fixture
def encoding() -> Iterator[threading.Event]:
    """Prompts that are encoded in a worker thread wait there until the event is set; at the end it is."""
    encode, may_go_on = Tokenizer.encode, threading.Event()

    def held(self: Tokenizer, text: str, *, add_special_tokens: bool = True) -> list[int]:
        if len(text) > LONG_PROMPT_BYTES:
            may_go_on.wait(20)
        return encode(self, text, add_special_tokens=add_special_tokens)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tokenizer, "encode", held)
        yield may_go_on
        may_go_on.set()
