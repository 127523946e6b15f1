"""EngineConfig: the floors' own configs, composed, frozen and checked once."""

from collections.abc import Mapping
from typing import Literal, get_args

import msgspec

from triode.actors.scheduler.config import SchedulerConfig
from triode.cache.config import CacheConfig
from triode.kernels.native.numa import MAX_NODES
from triode.models.config import ModelOptions

ExecutorMode = Literal["auto", "inline", "thread", "process"]


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything `open_engine` can be told besides the model.

    Raises:
        ValueError: at construction, for a value outside its limits.
    """

    options: ModelOptions = ModelOptions(model="smollm2-135m")
    cache: CacheConfig = CacheConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    executor: ExecutorMode = "auto"
    """Where steps run: "thread" (a thread of their own), "process" (a process of their own, which also holds the weights) or
    "inline" (in the event loop). auto takes process with tensor_parallel or numa_nodes, and where triode serve finds a
    GPU; else thread."""
    num_threads: int | None = None
    """CPU threads for one step; None takes torch's number, or as many as this process may use processors if that is less.
    With tensor_parallel it is that of each process."""
    tensor_parallel: int = 1
    """Processes that compute one model together on the CPU, each with its share of heads, inner features, processors
    and memory; it must divide the model's heads, KV heads and inner features."""
    numa_nodes: tuple[int, ...] = ()
    """The memory node of each of these processes, as in 0,1: it has the node's processors, and memory from nowhere else; empty
    leaves memory to the system."""
    warm_guides: bool = False
    """Get ready for guided output while the model loads, as triode serve does unless told not to; else the first guide takes
    about half a second, for which all requests wait."""

    def __post_init__(self) -> None:
        if self.executor not in get_args(ExecutorMode):
            raise ValueError(f"executor must be one of {', '.join(get_args(ExecutorMode))}, got {self.executor!r}")
        if self.num_threads is not None and (type(self.num_threads) is not int or self.num_threads < 1):
            raise ValueError(f"num_threads must be an integer >= 1, got {self.num_threads!r}")
        self._check_ranks()
        if not isinstance(self.warm_guides, bool):
            raise ValueError(f"warm_guides must be True or False, got {self.warm_guides!r}")

    def _check_ranks(self) -> None:
        ranks, nodes = self.tensor_parallel, self.numa_nodes
        if type(ranks) is not int or ranks < 1:
            raise ValueError(f"tensor_parallel must be an integer >= 1, got {ranks!r}")
        if not all(type(node) is int and 0 <= node < MAX_NODES for node in nodes):
            raise ValueError(f"numa_nodes must be integers >= 0 and < {MAX_NODES}, got {nodes!r}")
        if nodes and len(nodes) != ranks:
            raise ValueError(f"numa_nodes must be one for each of tensor_parallel = {ranks} processes, got {nodes!r}")
        if (ranks > 1 or nodes) and self.executor not in ("auto", "process"):
            names = f"tensor_parallel = {ranks}" if ranks > 1 else "numa_nodes"
            raise ValueError(f"executor must be auto or process with {names}, got {self.executor!r}")

    @property
    def runs_in_workers(self) -> bool:
        """Whether steps run in processes of their own."""
        return self.executor == "process" or self.tensor_parallel > 1 or bool(self.numa_nodes)

    def override(self, overrides: Mapping[str, object]) -> "EngineConfig":
        """A config with some settings changed, each by its own name whichever part it belongs to.

        Raises:
            ValueError: for a name that no part has, or a value outside its limits.
        """
        changed: dict[str, object] = {}
        left = dict(overrides)
        for part in PARTS:
            current = getattr(self, part)
            mine = {name: left.pop(name) for name in current.__struct_fields__ if name in left}
            if mine:
                changed[part] = msgspec.structs.replace(current, **mine)
        changed.update((name, left.pop(name)) for name in OWN if name in left)
        if left:
            raise ValueError(
                f"config keys must be among {', '.join(sorted(setting_names()))}, got {', '.join(sorted(left))}"
            )
        return msgspec.structs.replace(self, **changed)


PARTS = ("options", "cache", "scheduler")
OWN = ("executor", "num_threads", "tensor_parallel", "numa_nodes", "warm_guides")


def setting_names() -> tuple[str, ...]:
    """Every name that `open_engine` takes as an override."""
    defaults = EngineConfig()
    fields = [name for part in PARTS for name in getattr(defaults, part).__struct_fields__]
    return (*fields, *OWN)
