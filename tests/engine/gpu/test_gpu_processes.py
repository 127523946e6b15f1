"""The worker process and the command line on a GPU. `pytest -m gpu`."""

import json
import os
import select
import signal
import subprocess
import sys
import time

import pytest
import torch
import trio

import triode
from engines import LONG, greedy
from gpu_proofs import HALF_BILLION, Record, on_gpu
from triode.engine.engine import Engine

pytestmark = pytest.mark.gpu

ENGINE = f"""
import trio, triode

async def main():
    async with triode.open_engine({HALF_BILLION!r}, device="cuda", executor="process", kv_cache_bytes=2**30) as engine:
        async with engine.submit([1, 2, 3], triode.SamplingParams(max_tokens=20_000, ignore_eos=True)) as stream:
            await stream.batch()
            print(engine.report.worker_pids[0], flush=True)
            await stream.result()

trio.run(main)
"""


def triode_command(*arguments: str) -> str:
    finished = subprocess.run(
        [sys.executable, "-m", "triode.engine.cli.main", *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


def worker_pid(engine: Engine) -> int:
    return engine.report.worker_pids[0]


async def kill_worker_while_read(told_after_s: list[float]) -> None:
    killed_at_s = 0.0

    async def read() -> None:
        try:
            async with engine.submit([1, 2, 3], greedy(LONG)) as stream:
                async for _ in stream:
                    begun.set()
        except triode.EngineFault:
            told_after_s.append(time.perf_counter() - killed_at_s)

    async with on_gpu(HALF_BILLION).open(executor="process") as engine, trio.open_nursery() as nursery:
        begun = trio.Event()
        for _ in range(8):
            nursery.start_soon(read)
        await begun.wait()
        killed_at_s = time.perf_counter()
        os.kill(worker_pid(engine), signal.SIGKILL)
        await trio.sleep_forever()


async def test_every_reader_learns_within_a_second_that_the_worker_was_killed(record_property: Record) -> None:
    told_after_s: list[float] = []
    with pytest.raises(triode.EngineFault, match="was killed by SIGKILL"):
        await kill_worker_while_read(told_after_s)
    record_property("the last of 8 readers was told after", f"{max(told_after_s):.3f} s")
    assert len(told_after_s) == 8
    assert max(told_after_s) < 1


def test_a_worker_does_not_outlive_an_engine_that_is_killed(record_property: Record) -> None:
    engine = subprocess.Popen([sys.executable, "-c", ENGINE], stdout=subprocess.PIPE, text=True)
    assert engine.stdout is not None
    worker = os.pidfd_open(int(engine.stdout.readline()))
    free_bytes = torch.cuda.mem_get_info()[0]
    killed_at_s = time.perf_counter()
    engine.kill()
    assert select.select([worker], [], [], 5)[0], "the worker is still there"
    record_property("the worker was gone after", f"{time.perf_counter() - killed_at_s:.2f} s")
    os.close(worker)
    engine.communicate(timeout=5)
    # The weights and the cache of its gigabyte are.
    assert torch.cuda.mem_get_info()[0] > free_bytes + 2**30


def test_the_doctor_knows_the_gpu() -> None:
    name = torch.cuda.get_device_name()
    said = triode_command("doctor")
    assert name in said
    found = json.loads(triode_command("doctor", "--json"))
    assert found["device"] == "cuda"
    assert found["gpus"][0]["name"] == name
    assert found["gpus"][0]["free_bytes"] > 0
    assert all("Triton" in kernels for kernels in found["kernels"].values())


def test_bench_prints_a_row_for_each_batch(record_property: Record) -> None:
    said = triode_command(
        *("bench", "latency", HALF_BILLION, "--batches", "1,16", "--new-tokens", "32", "--prompt-tokens", "128"),
        *("--runs", "2", "--json", "/dev/stdout", "--kv-cache-bytes", str(2**30)),
    )
    rows = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    assert [row["batch"] for row in rows] == [1, 16]
    for row in rows:
        record_property(f"batch {row['batch']}", f"TPOT {row['tpot_ms']:.2f} ms, TTFT {row['ttft_ms']:.1f} ms")
        assert torch.cuda.get_device_name() in row["device"]
        assert 0 < row["tpot_ms"] < row["ttft_ms"]
