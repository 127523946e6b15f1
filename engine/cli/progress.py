"""Shows on stderr what a long step is doing: bars on a terminal, plain lines elsewhere, or records of a log."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import TextIO

from triode.models.progress import Progress


@contextmanager
def shown_progress() -> Iterator[Progress]:
    """Stages passed to the yielded object are shown on stderr while they last."""
    if not sys.stderr.isatty():
        lines = Lines(sys.stderr)
        try:
            yield lines
        finally:
            lines.close()
        return
    # Imported here: commands that show nothing do without it.
    from rich.console import Console

    from triode.engine.cli.bars import Bars

    with Bars(Console(stderr=True)) as bars:
        yield bars


@contextmanager
def stage(progress: Progress, name: str) -> Iterator[None]:
    """A stage of unknown length that lasts as long as the block."""
    progress.stage(name, None, "")
    yield
    progress.done()


class Lines:
    """One line a stage: its name, each quarter of the way, the time it took."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._is_open = False

    def stage(self, name: str, total: int | None, unit: str) -> None:
        """Begin a line."""
        self.close()
        self._is_open = True
        self._total = total
        self._amount = 0
        self._num_quarters = 0
        self._started_at_s = perf_counter()
        self._write(f"{name} ...")

    def advance(self, amount: int) -> None:
        """Note each quarter that has passed."""
        self._amount += amount
        if not self._total or not self._is_open:
            return
        while self._num_quarters < 3 and self._amount * 4 >= self._total * (self._num_quarters + 1):
            self._num_quarters += 1
            self._write(f" {self._num_quarters * 25}%")

    def done(self) -> None:
        """End the line."""
        if self._is_open:
            self._is_open = False
            self._write(f" {perf_counter() - self._started_at_s:.1f} s\n")

    def close(self) -> None:
        """Leave no line unfinished."""
        if self._is_open:
            self._is_open = False
            self._write("\n")

    def _write(self, text: str) -> None:
        self._file.write(text)
        self._file.flush()


class Records:
    """Two records of a log a stage: its name, and the time it took."""

    def __init__(self, log: logging.Logger) -> None:
        self._log = log
        self._name: str | None = None

    def stage(self, name: str, total: int | None, unit: str) -> None:
        """Note that it has begun."""
        self._name = name
        self._started_at_s = perf_counter()
        self._log.info("%s ...", name)

    def advance(self, amount: int) -> None:
        """Ignored."""

    def done(self) -> None:
        """Note how long it took."""
        if self._name is not None:
            self._log.info("%s took %.1f s", self._name, perf_counter() - self._started_at_s)
            self._name = None
