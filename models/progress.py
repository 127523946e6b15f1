"""How long steps tell what they are doing, and how they are told to stop."""

from typing import Protocol


class Progress(Protocol):
    """Receives the progress of one stage after another.

    Any method may raise to cancel: it is called between tensors, and what was read until then is dropped. An engine may
    call it in a thread that Trio does not know: reaching the event loop from there takes its `trio_token`.
    """

    def stage(self, name: str, total: int | None, unit: str) -> None:
        """A stage begins that takes `total` units; None where that is unknown."""

    def advance(self, amount: int) -> None:
        """The stage has done `amount` units more."""

    def done(self) -> None:
        """The stage is complete."""


class NullProgress:
    """Nobody is watching."""

    def stage(self, name: str, total: int | None, unit: str) -> None:
        """Ignored."""

    def advance(self, amount: int) -> None:
        """Ignored."""

    def done(self) -> None:
        """Ignored."""
