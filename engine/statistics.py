"""The engine's load, actor by actor."""

import msgspec

from triode.actors.scheduler.statistics import SchedulerStatistics
from triode.actors.statistics import InboxStatistics
from triode.cache.statistics import CacheStatistics
from triode.models.runner import RunnerStatistics


class ActorStatistics(msgspec.Struct, frozen=True):
    """Each actor's queue and busy time."""

    tokenizer: InboxStatistics
    scheduler: InboxStatistics
    cache: InboxStatistics
    executor: InboxStatistics
    detokenizer: InboxStatistics


class EngineStatistics(msgspec.Struct, frozen=True):
    """Taken at one moment; totals count from the engine's start."""

    num_unfinished: int
    """Requests submitted and not ended."""
    num_submitted: int
    actors: ActorStatistics
    scheduler: SchedulerStatistics
    cache: CacheStatistics
    runner: RunnerStatistics
    """Steps and where their time went."""
