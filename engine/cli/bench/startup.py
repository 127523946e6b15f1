"""How long `triode run` takes from its start to its first token, in a process of its own."""

import subprocess
import sys
from time import perf_counter

import msgspec

from triode.engine.cli.bench.measure import Figures
from triode.engine.cli.bench.workload import Request, Workload
from triode.errors import TriodeError


class StartedEngine(msgspec.Struct, frozen=True):
    """What a started engine says of itself (the part of `triode.engine.parts.Report` that a row needs)."""

    model: str
    device: str
    dtype: str
    kernels: str


class _Output(msgspec.Struct, frozen=True):
    engine: StartedEngine


STARTUP = Workload(test="startup", requests=(Request((0,), 1),))
"""What the started process is asked for: one token."""


def measure_startup(model: str, flags: list[str]) -> tuple[Figures, StartedEngine]:
    """Start a process and wait for the first byte that it prints.

    Raises:
        ValueError, TriodeError: what it failed with.
    """
    words = ["run", model, "--raw", "--json", "-p", "Hello", "--max-tokens", "1", "--temperature", "0", *flags]
    started_at_s = perf_counter()
    command = [sys.executable, "-m", "triode.engine.cli.main", *words]
    # Unbuffered, so that reading one byte leaves the others to `communicate`.
    with subprocess.Popen(command, bufsize=0, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        first = process.stdout.read(1)
        ttft_ms = (perf_counter() - started_at_s) * 1e3
        rest, errors = process.communicate()
    if process.returncode != 0:
        message = errors.decode().strip().rpartition("triode: error: ")[2]
        raise ValueError(message) if process.returncode == 2 else TriodeError(message)
    figures = Figures(tpot_ms=None, ttft_ms=ttft_ms, out_tok_s=None, total_tok_s=None)
    return figures, msgspec.json.decode(first + rest, type=_Output).engine
