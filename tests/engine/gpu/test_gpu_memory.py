"""Memory of a GPU: what an engine takes, what it leaves, and what it says when there is too little. `pytest -m gpu`."""

import gc

import pytest
import torch
import trio

import triode
from engines import complete, greedy
from gpu_proofs import HALF_BILLION, SEVEN_BILLION, Record, bits, new_salt, on_gpu, scored

pytestmark = pytest.mark.gpu

NUM_CYCLES = 20
MOST_DRIFT_BYTES = 64 * 2**20
PROMPTS = [list(range(start, start + 300)) for start in range(1000, 1064)]


@pytest.fixture(scope="module", autouse=True)
def _checkpoints_are_opened_once() -> None:
    """They are not, here: a checkpoint of random weights keeps a table of random numbers on the device."""


def memory() -> tuple[int, int]:
    """Bytes that torch has allocated, and bytes that the driver has free."""
    gc.collect()
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated(), torch.cuda.mem_get_info()[0]


async def test_two_engines_opened_and_closed_twenty_times_leave_nothing(record_property: Record) -> None:
    small = on_gpu(HALF_BILLION)
    settings = {"max_running": 64, "max_step_tokens": 1024, "kv_cache_bytes": 2**30}
    torch.cuda.init()
    allocated, _ = memory()
    free = []
    for _ in range(NUM_CYCLES):
        async with small.open(**settings) as first, small.open(**settings, model="random:qwen3-0.6b") as second:
            for engine in (first, second):
                # Each size of batch twice: the second time it is captured.
                for _ in range(2):
                    await engine.generate(PROMPTS, greedy(8))
        assert memory()[0] == allocated
        free.append(memory()[1])
    drift_bytes = max(free[1:]) - min(free[1:])
    record_property("free bytes of cycles 2 to 20, largest less smallest", drift_bytes)
    assert drift_bytes <= MOST_DRIFT_BYTES


async def test_an_engine_that_is_closed_takes_nothing_that_another_ones_graphs_use() -> None:
    scale = on_gpu(HALF_BILLION)
    settings = {"max_running": 64, "max_step_tokens": 1024, "kv_cache_bytes": 2**30}
    params = scored(12)
    async with scale.open(**settings) as engine:

        async def outputs() -> list[object]:
            await engine.cache.clear()
            return [bits(result) for result in await engine.generate(PROMPTS, params)]

        expected = await outputs()
        assert await outputs() == expected
        async with scale.open(**settings) as other:
            await other.generate(PROMPTS, params)
        # What the other one had is somebody else's now.
        torch.full((2**28,), torch.nan, device="cuda")
        assert await outputs() == expected


@pytest.mark.parametrize("model", [HALF_BILLION, SEVEN_BILLION])
async def test_the_cache_takes_its_fraction_of_what_the_largest_steps_leave(
    model: str, record_property: Record
) -> None:
    scale = on_gpu(model)
    sizes = {}
    for fraction in (0.3, 0.9):
        # So many sequences of such length that no fraction holds them all.
        limits = {"max_running": 512, "max_context_tokens": 32_768}
        async with scale.open(**limits, kv_cache_bytes=None, kv_cache_fraction=fraction) as engine:
            sizes[fraction] = engine.report.kv_cache_bytes
            record_property(f"kv_cache_fraction {fraction}", f"{sizes[fraction] / 2**30:.2f} GiB")
            # The largest steps still find room.
            await engine.generate([[index] * 4000 for index in range(1, 17)], greedy(4))
            await engine.generate([[index] for index in range(1, 513)], greedy(4))
            record_property(f"free with {fraction}", f"{torch.cuda.mem_get_info()[0] / 2**30:.2f} GiB")
            assert torch.cuda.mem_get_info()[0] > 0
    assert sizes[0.9] == pytest.approx(3 * sizes[0.3], rel=0.02)


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"kv_cache_bytes": 2**40}, "lower kv_cache_bytes"),
        ({"max_step_tokens": 8 * 2**20}, r"lower max_step_tokens \(8388608\) or max_running \(256\)"),
    ],
)
async def test_an_engine_that_does_not_fit_says_what_to_lower_and_leaves_nothing(
    settings: dict[str, object], what: str
) -> None:
    torch.cuda.init()
    allocated, _ = memory()
    with pytest.raises(triode.InsufficientMemory, match=what) as caught:
        async with on_gpu(HALF_BILLION).open(**settings):
            pytest.fail("it has been opened")
    # Its traceback holds on to what was being built, and Trio to the error, until this task next yields to it.
    del caught
    await trio.lowlevel.checkpoint()
    assert memory()[0] == allocated


async def test_weights_that_do_not_fit_are_refused_before_they_are_read() -> None:
    free_bytes = memory()[1]
    taken = torch.empty(free_bytes - 2**30, dtype=torch.uint8, device="cuda")
    with pytest.raises(triode.InsufficientMemory, match=r"the weights in .* choose a smaller model"):
        async with on_gpu(SEVEN_BILLION).open():
            pytest.fail("it has been opened")
    del taken
    torch.cuda.empty_cache()


async def test_a_device_that_is_nearly_full_still_serves() -> None:
    """What is free is asked for, not assumed."""
    free_bytes = memory()[1]
    taken = torch.empty(free_bytes - 6 * 2**30, dtype=torch.uint8, device="cuda")
    async with on_gpu(HALF_BILLION).open(max_running=16, kv_cache_bytes=None) as engine:
        assert engine.report.kv_cache_bytes < 6 * 2**30
        result = await complete(engine, [1, 2, 3], greedy(8), cache_salt=new_salt())
        assert len(result.completion.token_ids) == 8
    del taken
    torch.cuda.empty_cache()
