"""Progress bars on a terminal."""

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.progress import Progress as RichProgress
from rich.text import Text


class _Amount(ProgressColumn):
    """Bytes as such, everything else as a count, nothing where the total is unknown."""

    def __init__(self) -> None:
        super().__init__()
        self._bytes = DownloadColumn()
        self._count = MofNCompleteColumn()

    def render(self, task: Task) -> Text:
        if task.total is None:
            return Text()
        unit = task.fields["unit"]
        return self._bytes.render(task) if unit in ("B", "bytes") else self._count.render(task).append(f" {unit}")


class Bars:
    """One bar a stage. All vanish when the block ends, so that only the command's output stays."""

    def __init__(self, console: Console) -> None:
        self._progress = RichProgress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            _Amount(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
        )
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._progress.stop()

    def stage(self, name: str, total: int | None, unit: str) -> None:
        """Add a bar."""
        self.done()
        self._task = self._progress.add_task(name, total=total, unit=unit)

    def advance(self, amount: int) -> None:
        """Move the bar."""
        if self._task is not None:
            self._progress.advance(self._task, amount)

    def done(self) -> None:
        """Fill the bar."""
        if self._task is not None:
            total = self._progress.tasks[self._task].total
            # A stage of unknown length becomes one unit, which is done.
            self._progress.update(self._task, total=total or 1, completed=total or 1)
            self._progress.stop_task(self._task)
            self._task = None
