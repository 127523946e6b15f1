"""What every test shares: the same random numbers and the same Hypothesis examples in each run, which are never timed;
Ctrl-C works, and no GPU is found by a test that is not about one."""

import os
import signal
import sys

import pytest
from hypothesis import settings

settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.register_profile("thorough", deadline=None, max_examples=2_000)
settings.load_profile("repeatable")


def pytest_configure(config: pytest.Config) -> None:
    # An engine that may choose its device would take it.
    if "not gpu" in config.option.markexpr:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    # A shell's background jobs begin with SIGINT ignored, and so would every process that a test starts.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is not None:
        import torch

        if not torch.cuda.is_available():
            pytest.skip("torch finds no GPU here")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What tests have recorded is told, because somebody wants to quote it."""
    for outcome in ("passed", "failed"):
        for report in terminalreporter.getreports(outcome):
            for name, value in report.user_properties if report.when == "call" else ():
                terminalreporter.write_line(f"{report.nodeid}: {name}: {value}")


@pytest.fixture(autouse=True)
def same_numbers_in_every_run() -> None:
    """Random tensors are the same whenever and in whatever order a test runs; tests without torch do not import it."""
    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)
