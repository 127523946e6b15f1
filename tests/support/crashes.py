"""Makes one actor of an engine fail, when a test says so."""

import pytest

from triode.actors.detokenizer.batch import Detokenizer
from triode.actors.scheduler.policy import Scheduler
from triode.cache.manager import CacheManager
from triode.engine import hub
from triode.models.eager import EagerRunner

CORES: dict[str, tuple[object, str]] = {
    "tokenizer": (hub, "prepare"),
    "scheduler": (Scheduler, "commit"),
    "cache": (CacheManager, "reserve"),
    "executor": (EagerRunner, "launch"),
    "detokenizer": (Detokenizer, "read"),
}
"""What each actor asks when it has work."""


class Boom(Exception):
    """A bug."""


class Bomb:
    """Raises from an actor's core once it is armed."""

    def __init__(self, patch: pytest.MonkeyPatch, actor: str, error: BaseException | None = None) -> None:
        self.is_armed = False
        owner, name = CORES[actor]
        original = getattr(owner, name)

        def core(*args: object, **options: object) -> object:
            if self.is_armed:
                raise error or Boom("it broke")
            return original(*args, **options)

        patch.setattr(owner, name, core)
