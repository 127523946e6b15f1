"""What is written while long steps run."""

import io
import logging
import re

import pytest
from rich.console import Console

from triode.engine.cli.bars import Bars
from triode.engine.cli.progress import Lines, Records, shown_progress, stage


def without_times(text: str) -> str:
    return re.sub(r"\d+\.\d s", "N s", text)


def test_a_stage_is_one_line_with_each_quarter_and_its_time() -> None:
    file = io.StringIO()
    lines = Lines(file)
    lines.stage("Reading weights", 8, "tensors")
    for _ in range(8):
        lines.advance(1)
    lines.done()
    assert without_times(file.getvalue()) == "Reading weights ... 25% 50% 75% N s\n"


def test_a_large_advance_passes_several_quarters() -> None:
    file = io.StringIO()
    lines = Lines(file)
    lines.stage("Reading", 100, "B")
    lines.advance(60)
    lines.advance(40)
    lines.done()
    assert without_times(file.getvalue()) == "Reading ... 25% 50% 75% N s\n"


def test_a_stage_that_is_not_finished_leaves_no_open_line() -> None:
    file = io.StringIO()
    lines = Lines(file)
    lines.stage("First", None, "")
    lines.advance(3)
    lines.stage("Second", None, "")
    lines.close()
    lines.close()
    assert file.getvalue() == "First ...\nSecond ...\n"


def test_without_a_terminal_progress_is_lines_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    with shown_progress() as progress, stage(progress, "Working"):
        pass
    assert without_times(capsys.readouterr().err) == "Working ... N s\n"


def test_bars_follow_their_stages_and_vanish() -> None:
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=100, color_system=None)
    with Bars(console) as bars:
        bars.stage("Downloading", None, "")
        bars.done()
        bars.stage("Reading weights", 4, "tensors")
        bars.advance(3)
        bars.stage("Sizing", 2_000_000, "bytes")
        bars.advance(1_000_000)
    # A stage ends where the next one begins.
    assert "4/4 tensors" in file.getvalue()
    assert "1.0/2.0 MB" in file.getvalue()


def test_in_a_log_a_stage_is_two_records(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        records = Records(logging.getLogger("triode.test"))
        records.stage("Reading weights", 8, "tensors")
        records.advance(8)
        records.done()
        # A stage within a stage has ended both.
        records.done()
    assert [without_times(said) for said in caplog.messages] == ["Reading weights ...", "Reading weights took N s"]
