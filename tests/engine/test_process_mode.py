"""An engine whose steps run in a worker process: the same tokens, and nobody outlives anybody."""

import os
import select
import signal
import subprocess
import sys
from collections.abc import Sequence

import pytest
import trio

import triode
from engines import LONG, SMALL, TINY, complete, drawn, greedy, open_tiny
from triode.engine.completion import Result
from triode.engine.engine import Engine
from triode.engine.request import Prompt

REQUESTS: Sequence[tuple[Prompt, triode.SamplingParams]] = (
    ("Why is the sky blue?", greedy(24, logprobs=3)),
    ("Why is the sky blue?", greedy(4, prompt_logprobs=2)),
    (range(1000, 1200), drawn(24, logprobs=0, top_p=0.9, presence_penalty=0.5)),
    ("The", drawn(12, n=3, logit_bias={5: -100.0, 7: float("-inf")}, bad_words=("the", "a"))),
    ([{"role": "user", "content": "Hello!"}], drawn(16, top_k=40, min_p=0.01, stop=("e",))),
    ("Say: ", triode.SamplingParams(max_tokens=20, seed=3, guide=triode.Regex("[a-z]{3,9}!"))),
)


async def complete_all(engine: Engine) -> list[Result]:
    """All requests at once, so that steps mix them."""
    results: dict[int, Result] = {}

    async def run(index: int, prompt: Prompt, params: triode.SamplingParams) -> None:
        results[index] = await complete(engine, prompt, params, request_id=f"{index}")

    async with trio.open_nursery() as nursery:
        for index, (prompt, params) in enumerate(REQUESTS):
            nursery.start_soon(run, index, prompt, params)
    return [results[index] for index in range(len(REQUESTS))]


def worker_pid(engine: Engine) -> int:
    return engine.report.worker_pids[0]


def facts(result: Result) -> object:
    """What must not depend on where steps run."""
    samples = [(sample.text, sample.token_ids, sample.logprobs, sample.finish_reason) for sample in result.completions]
    return samples, result.prompt_logprobs


async def test_thread_and_process_mode_give_the_same_tokens_and_logprobs() -> None:
    async with open_tiny(executor="thread") as here, open_tiny(executor="process") as there:
        assert (here.report.executor, there.report.executor) == ("thread", "process")
        assert [facts(result) for result in await complete_all(here)] == [
            facts(result) for result in await complete_all(there)
        ]
        assert await here.embed(["Why is the sky blue?"]) == await there.embed(["Why is the sky blue?"])
        statistics = there.statistics()
        assert statistics.runner.num_steps == statistics.scheduler.num_steps > 0


async def read_until_fault(engine: Engine, begun: trio.Event, told: list[str]) -> None:
    try:
        async with engine.submit("Once", greedy(LONG)) as stream:
            async for _ in stream:
                begun.set()
    except triode.EngineFault as fault:
        told.append(str(fault))


async def kill_worker_while_read(told: list[str]) -> None:
    async with open_tiny(executor="process") as engine, trio.open_nursery() as nursery:
        events = [trio.Event() for _ in range(4)]
        for begun in events:
            nursery.start_soon(read_until_fault, engine, begun, told)
        for begun in events:
            await begun.wait()
        os.kill(worker_pid(engine), signal.SIGKILL)
        # The engine cancels this block; TooSlowError would get out of it if it came first.
        with trio.fail_after(1):
            await trio.sleep_forever()


async def test_every_reader_learns_within_a_second_that_the_worker_was_killed() -> None:
    told: list[str] = []
    with pytest.raises(triode.EngineFault, match="was killed by SIGKILL"):
        await kill_worker_while_read(told)
    assert len(told) == 4
    assert all("was killed by SIGKILL" in message for message in told)


@pytest.mark.parametrize(
    "model",
    [
        # The engine's process looks for the model first, while the worker is still importing torch.
        "no-such-model",
        pytest.param("random:no-such-model", marks=pytest.mark.slow),
    ],
)
async def test_a_model_that_is_nowhere_is_not_found_in_either_mode(model: str) -> None:
    said = []
    for executor in ("thread", "process"):
        with pytest.raises(triode.ModelNotFound) as caught:
            async with triode.open_engine(model, executor=executor):
                pytest.fail("it has been opened")
        said.append(str(caught.value))
    assert said[0] == said[1]


ENGINE = f"""
import sys, trio, triode

async def main():
    async with triode.open_engine({TINY!r}, executor="process", **{SMALL!r}) as engine:
        async with engine.submit("Once", triode.SamplingParams(max_tokens={LONG}, ignore_eos=True)) as stream:
            async for _ in stream:
                print(engine.report.worker_pids[0], "torch" in sys.modules, flush=True)
                await trio.sleep_forever()

trio.run(main)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="watches a process that is not its child")
def test_ctrl_c_leaves_no_worker_and_the_engines_process_imports_no_torch() -> None:
    engine = subprocess.Popen(
        [sys.executable, "-c", ENGINE],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert engine.stdout is not None
    pid, has_torch = engine.stdout.readline().split()
    worker = os.pidfd_open(int(pid))
    os.killpg(engine.pid, signal.SIGINT)
    assert select.select([worker], [], [], 20)[0], "the worker is still there"
    os.close(worker)
    _, written = engine.communicate(timeout=20)
    assert engine.returncode == -signal.SIGINT
    assert written.count("Traceback") == 1, written
    assert has_torch == "False"
