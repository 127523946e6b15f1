"""Whether a server that is used and misused for long stays as it is.

    python benchmarks/soak.py [--minutes 10] [--server uvicorn|hypercorn]

`triode serve random:tiny` runs in a process of its own. Clients stream, leave in the middle, come over the bridge, lose their
sockets and come back, and send what is no request. Memory is read once a second. It must not grow: the median of the
last quarter may be 5 % above that of the second. At the end nothing may be unfinished, and no block in use.
"""

import argparse
import os
import re
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from random import Random
from statistics import median

import httpx
import trio

import triode
from triode.engine.client import connect
from triode.errors import EngineBusy, ServerUnreachable

NUM_CLIENTS = 4
"""Of each kind."""
GROWTH = 1.05


class Soak:
    """Clients of one server, until they are told to stop."""

    def __init__(self, url: str) -> None:
        self.counts: Counter[str] = Counter()
        self._url = url
        self._rng = Random(0)
        self._client = httpx.AsyncClient(base_url=url, timeout=60, limits=httpx.Limits(max_connections=None))

    async def run(self, duration_s: float) -> None:
        kinds: list[Callable[[], Awaitable[None]]] = [
            self.stream,
            self.leave,
            self.bridge,
            self.lose_socket,
            self.misuse,
        ]
        async with self._client:
            with trio.move_on_after(duration_s):
                async with trio.open_nursery() as nursery:
                    for kind in kinds:
                        for _ in range(NUM_CLIENTS):
                            nursery.start_soon(self._repeat, kind)

    async def _repeat(self, kind: Callable[[], Awaitable[None]]) -> None:
        while True:
            await kind()
            self.counts[kind.__name__] += 1

    def _body(self, max_tokens: int) -> dict[str, object]:
        prompt = " ".join(str(self._rng.randint(0, 999)) for _ in range(self._rng.randint(1, 60)))
        return {
            "prompt": prompt,
            "max_tokens": max_tokens,
            "ignore_eos": True,
            "stream": True,
            "n": self._rng.choice((1, 2)),
        }

    async def stream(self) -> None:
        async with self._client.stream("POST", "/v1/completions", json=self._body(40)) as response:
            async for _ in response.aiter_raw():
                pass

    async def leave(self) -> None:
        async with self._client.stream("POST", "/v1/completions", json=self._body(4000)) as response:
            async for _ in response.aiter_raw():
                return

    async def bridge(self) -> None:
        async with connect(self._url) as client:
            for _ in range(5):
                async with client.submit("Once", triode.SamplingParams(max_tokens=20, ignore_eos=True)) as stream:
                    await stream.result()

    async def lose_socket(self) -> None:
        try:
            async with connect(self._url, resume_grace_s=2) as client:
                stream = await client.submit("Once", triode.SamplingParams(max_tokens=60, ignore_eos=True))
                await stream.batch()
                with trio.move_on_after(self._rng.random()):
                    await stream.result()
        except (EngineBusy, ServerUnreachable):
            self.counts["refused"] += 1

    async def misuse(self) -> None:
        for content in (b"{", b"\xff", b'{"prompt": 1}', b"[" * 5000, b'{"prompt": "x", "top_p": 7}'):
            answer = await self._client.post("/v1/completions", content=content)
            assert answer.status_code == 400, answer.text
        assert (await self._client.get("/nope")).status_code == 404
        await trio.sleep(0.05)


def resident_mib(pid: int) -> float:
    """Memory of a process."""
    return int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1]) / 1024  # type: ignore[index]


async def watch(pid: int, sizes_mib: list[float]) -> None:
    while True:
        sizes_mib.append(resident_mib(pid))
        await trio.sleep(1)


async def soak(url: str, pid: int, minutes: float) -> bool:
    """Whether all went well."""
    sizes_mib: list[float] = []
    clients = Soak(url)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch, pid, sizes_mib)
        await clients.run(minutes * 60)
        nursery.cancel_scope.cancel()
    # Those whose sockets were lost are waited for.
    await trio.sleep(3)
    async with httpx.AsyncClient(base_url=url) as client:
        metrics = (await client.get("/metrics")).text
    left = {
        name: float(re.findall(rf"^{name}{{.*}} (\S+)", metrics, re.MULTILINE)[0])
        for name in ("triode:requests_unfinished", "vllm:kv_cache_usage_perc", "vllm:websocket_connections_active")
    }
    quarter = max(len(sizes_mib) // 4, 1)
    early, late = median(sizes_mib[quarter : 2 * quarter] or sizes_mib), median(sizes_mib[-quarter:])
    print(
        f"{dict(clients.counts)}\nleft: {left}\nMiB: start {sizes_mib[0]:.0f}, second quarter {early:.0f}, last {late:.0f}"
    )
    return not any(left.values()) and late <= GROWTH * early


def main() -> int:
    """Exit status 1 if something was left, or grew."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--server", default="uvicorn")
    arguments = parser.parse_args()
    words = ["serve", "random:tiny", "--port", "0", "--kv-cache-bytes", "16000000", "--no-log-requests"]
    command = [sys.executable, "-m", "triode.engine.cli.main", *words, "--server", arguments.server]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stderr is not None
        try:
            address = next(found[1] for line in process.stderr if (found := re.search(r" at (http://\S+) ", line)))
            # A pipe that nobody reads would stop the server at its next line.
            threading.Thread(target=process.stderr.read, daemon=True).start()
            is_well = trio.run(soak, address, process.pid, arguments.minutes)
            process.send_signal(signal.SIGTERM)
            is_well &= process.wait(60) == 0
        finally:
            process.kill()
    return 0 if is_well else 1


if __name__ == "__main__":
    sys.exit(main())
