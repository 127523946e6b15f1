"""An engine without work costs nothing."""

import subprocess
import sys

import pytest

IDLE = """
import resource, sys, time
import trio, triode

def cpu_s():
    own = resource.getrusage(resource.RUSAGE_SELF)
    return own.ru_utime + own.ru_stime

async def main():
    async with triode.open_engine("random:tiny", kv_cache_bytes=2**21, executor=sys.argv[1]) as engine:
        await engine.generate(["Once upon a time"], triode.SamplingParams(max_tokens=8))
        await trio.sleep(1)
        start = cpu_s()
        await trio.sleep(float(sys.argv[2]))
        print(cpu_s() - start)

trio.run(main)
"""


def idle_cpu_s(executor: str, seconds: float) -> float:
    """CPU time of the whole process, all its threads, while an engine that has worked waits for more."""
    command = [sys.executable, "-c", IDLE, executor, str(seconds)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def test_an_idle_engine_takes_no_cpu() -> None:
    assert idle_cpu_s("thread", 4) < 4 * 0.005


@pytest.mark.slow
@pytest.mark.parametrize("executor", ["inline", "thread"])
def test_an_engine_idle_for_a_minute_takes_no_cpu(executor: str) -> None:
    assert idle_cpu_s(executor, 60) < 60 * 0.005
