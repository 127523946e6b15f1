"""Makes one actor of an engine fail, or its steps stand still, when a test says so."""

import threading

import pytest

from triode.actors.detokenizer.batch import Detokenizer
from triode.actors.scheduler.policy import Scheduler
from triode.cache.manager import CacheManager
from triode.engine import hub
from triode.models.eager import EagerRunner
from triode.models.step import StepPlan

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


def pausable_steps(patch: pytest.MonkeyPatch) -> threading.Event:
    """While the returned event is cleared, no step of an engine with an executor thread begins."""
    may_run, launch = threading.Event(), EagerRunner.launch
    may_run.set()

    def launch_later(self: EagerRunner, plan: StepPlan) -> None:
        may_run.wait(10)
        launch(self, plan)

    patch.setattr(EagerRunner, "launch", launch_later)
    return may_run
