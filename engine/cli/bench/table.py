"""The rows of a benchmark: as a table for people, as JSON lines for machines."""

from pathlib import Path
from statistics import median

import msgspec
from rich.console import Console
from rich.table import Table

from triode.engine.cli.bench.measure import Figures


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One workload on one machine. Each figure is the median of the runs."""

    test: str
    model: str
    device: str
    dtype: str
    batch: int
    prompt_len: int
    """Tokens; the mean where prompts differ in length."""
    new_tokens: int
    """The same of the outputs."""
    tpot_ms: float | None
    ttft_ms: float | None
    out_tok_s: float | None
    total_tok_s: float | None
    runs: int
    lowest: Figures = msgspec.field(name="min")
    highest: Figures = msgspec.field(name="max")
    versions: dict[str, str]
    """Of what the figures depend on, and the kernels in use."""
    read_gb_s: float | None = None
    """How fast the machine read memory right after each run, the median; None where it was not measured."""
    of_reading: float | None = None
    """What part of that a decode step reaches, the bytes of its matrices by its time per token: the median of the runs."""


def summary(runs: list[Figures]) -> tuple[Figures, Figures, Figures]:
    """Median, lowest and highest of each figure."""
    columns = [
        [value for run in runs if (value := getattr(run, name)) is not None] for name in Figures.__struct_fields__
    ]
    middle, lowest, highest = (
        Figures(*(choose(column) if column else None for column in columns)) for choose in (median, min, max)
    )
    return middle, lowest, highest


def write_json(path: Path, rows: list[Row]) -> None:
    """One object a line."""
    path.write_bytes(b"".join(msgspec.json.encode(row) + b"\n" for row in rows))


def print_table(rows: list[Row]) -> None:
    """Median and range of each figure."""
    console = Console()
    if not console.is_terminal:
        # There is no window to fit into, and a wrapped table is hard to read.
        console.width = 160
    first = rows[0]
    table = Table(
        title=f"{first.model}, {first.dtype}, {first.device}; kernels: {first.versions['kernels']}",
        caption=f"median of {first.runs} runs (lowest to highest)",
    )
    table.add_column("test")
    for heading in ("batch", "prompt", "new", "TPOT ms", "TTFT ms", "out tok/s", "total tok/s"):
        table.add_column(heading, justify="right")
    if has_reading := any(row.of_reading is not None for row in rows):
        table.add_column("reads weights at", justify="right")
    for row in rows:
        cells = (_cell(row, name) for name in Figures.__struct_fields__)
        own = (*cells, _reading_cell(row)) if has_reading else cells
        table.add_row(row.test, str(row.batch), str(row.prompt_len), str(row.new_tokens), *own)
    console.print(table)


def _cell(row: Row, name: str) -> str:
    value = getattr(row, name)
    if value is None:
        return ""
    return f"{_number(value)} ({_number(getattr(row.lowest, name))} to {_number(getattr(row.highest, name))})"


def _reading_cell(row: Row) -> str:
    # A row whose requests' tokens came all together has no time per token, and so no part of anything.
    return "" if row.of_reading is None else f"{row.of_reading:.0%} of {row.read_gb_s:.1f} GB/s"


def _number(value: float) -> str:
    """Three digits or more, whatever the size."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
