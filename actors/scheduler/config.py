"""How many requests run and wait, and how much one step computes."""

import msgspec


class SchedulerConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Limits of the scheduler.

    Raises:
        ValueError: at construction, for a value outside its limits.
    """

    max_running: int = 64
    """Sequences in one step at most; each holds a slot of the runner's batch."""
    max_queued: int = 4096
    """Unfinished requests at most, running ones included; one more raises EngineBusy."""
    max_step_tokens: int = 512
    """Tokens computed in one step at most: every running sequence's next token, then chunks of prompts."""

    def __post_init__(self) -> None:
        for name in ("max_running", "max_queued", "max_step_tokens"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} must be an integer >= 1, got {value!r}")
        if self.max_step_tokens <= self.max_running:
            raise ValueError(
                f"max_step_tokens must be > max_running = {self.max_running}, so that a full batch leaves room for "
                f"prompts, got {self.max_step_tokens}"
            )
