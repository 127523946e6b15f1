"""What a start on a GPU tries out before it serves, and what it says when the GPU refuses."""

import pytest
import torch

pytest.importorskip("triton")

from triode.errors import EngineFault, InsufficientMemory
from triode.models.cuda.build import explained, steps_to_rehearse
from triode.models.cuda.rehearsal import Rehearsal

MAX_CONTEXT_TOKENS = 4096


def sizes_of_steps(max_running: int) -> list[list[int]]:
    """The query tokens of each row, of each step."""
    rehearsal = Rehearsal(16, MAX_CONTEXT_TOKENS)
    return [list(plan.num_query_tokens) for plan in steps_to_rehearse(rehearsal, max_running, 2048)]


@pytest.mark.parametrize("max_running", [1, 2, 256])
def test_a_start_tries_out_one_token_and_ends_with_the_largest_batch_twice(max_running: int) -> None:
    first, *others = sizes_of_steps(max_running)
    assert first == [2048]
    assert [1] in others
    assert others[-2:] == [[1] * max_running] * 2
    # More would capture before what is measured last.
    assert others.count([1] * max_running) == 2


def test_a_launch_that_finds_no_place_says_what_to_do() -> None:
    refusal = RuntimeError("Triton Error [CUDA]: too many blocks in cooperative launch")
    with pytest.raises(EngineFault, match="unset CUDA_MPS_ACTIVE_THREAD_PERCENTAGE") as caught, explained(2048, 256):
        raise refusal
    assert caught.value.__cause__ is refusal


@pytest.mark.parametrize(
    "refusal",
    [
        torch.cuda.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
    ],
    ids=["allocator", "graph", "launch"],
)
def test_memory_that_is_short_says_what_to_lower(refusal: RuntimeError) -> None:
    with (
        pytest.raises(InsufficientMemory, match=r"lower max_step_tokens \(2048\) or max_running \(256\)"),
        explained(2048, 256),
    ):
        raise refusal


def test_any_other_error_rises_as_it_is() -> None:
    fault = RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")
    with pytest.raises(RuntimeError) as caught, explained(2048, 256):
        raise fault
    assert caught.value is fault
