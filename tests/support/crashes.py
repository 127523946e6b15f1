"""Makes one actor of an engine fail, or its steps stand still, when a test says so."""

import threading
from collections.abc import Callable

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


def break_down() -> None:
    raise Boom("it broke")


class Bomb:
    """Goes off in an actor's core, at most once, when it is armed."""

    def __init__(self, patch: pytest.MonkeyPatch, actor: str, go_off: Callable[[], object] = break_down) -> None:
        self.is_armed = False
        self.went_off = False
        owner, name = CORES[actor]
        original = getattr(owner, name)

        def core(*args: object, **options: object) -> object:
            if self.is_armed and not self.went_off:
                self.went_off = True
                go_off()
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
