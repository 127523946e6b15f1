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


def pausable_steps(patch: pytest.MonkeyPatch, *, pause_after: int | None = None) -> threading.Event:
    """While the returned event is cleared, no step of an engine with an executor thread begins. It is cleared by itself
    when `pause_after` steps have begun."""
    may_run, launch, num_begun = threading.Event(), EagerRunner.launch, 0
    may_run.set()

    def launch_later(self: EagerRunner, plan: StepPlan) -> None:
        nonlocal num_begun
        may_run.wait(20)
        num_begun += 1
        if num_begun == pause_after:
            may_run.clear()
        launch(self, plan)

    patch.setattr(EagerRunner, "launch", launch_later)
    return may_run
