"""What a start compiles before anything is launched is what is launched then."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import triton

from absent_world import AbsentWorld
from cross_compile import HOPPER, AbsentDriver
from triode.kernels.compile_ahead import launches_only_compile
from triode.models.cuda.rehearsal import compile_ahead
from triode.models.random_model import random_config

pytestmark = pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")


NEW_DEVICE = 1000
"""Other tests have compiled nothing for it."""


@contextmanager
def asked_for(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[str]]:
    """The kernels that would be compiled for an absent GPU, with their constants and types; none is."""
    kernels: set[str] = set()

    def note(**told: Any) -> bool:
        kernels.add(f"{told['repr']} {told['compile']['key']}")
        return True

    with monkeypatch.context() as patch:
        patch.setattr(triton.runtime.driver, "_active", AbsentDriver(90, device=NEW_DEVICE))
        patch.setattr(triton.knobs.runtime, "jit_cache_hook", note)
        yield kernels


@pytest.mark.parametrize("model", ["qwen2.5-7b", "tiny-qwen2"])
def test_nothing_is_left_to_compile_for_steps_of_any_kind(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with asked_for(monkeypatch) as ahead:
        compile_ahead(
            random_config(model),
            torch.bfloat16,
            HOPPER,
            block_size_tokens=16,
            max_running=256,
            max_tokens=4096,
            max_rows=256,
        )
    with asked_for(monkeypatch) as later, launches_only_compile():
        AbsentWorld(model, torch.bfloat16, HOPPER).play()
    assert len(later) > 20
    assert later <= ahead
