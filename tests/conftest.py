"""What every test shares: the same random numbers and the same Hypothesis examples in each run, which are never timed."""

import sys

import pytest
from hypothesis import settings

settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.register_profile("thorough", deadline=None, max_examples=2_000)
settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def same_numbers_in_every_run() -> None:
    """Random tensors are the same whenever and in whatever order a test runs; tests without torch do not import it."""
    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)
