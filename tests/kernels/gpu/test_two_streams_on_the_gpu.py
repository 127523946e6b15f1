"""Programs of a layer of one token wait for one another: two launches at once must not keep each other from running."""

import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

from one_token_layers import OneTokenLayer
from triode.kernels.decode_layer.plan import LayerSizes, layer_plan
from triode.kernels.gpu_traits import GpuTraits

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore")]

LIMIT_S = 240
"""For a process that loads torch, compiles and launches."""
SMOLLM2 = LayerSizes(hidden=576, intermediate=1536, num_heads=9, num_kv_heads=3, head_dim=64)


def test_launches_in_two_streams_finish_with_the_bits_of_each_alone() -> None:
    """As of two engines in a process: one of its own, which can be ended where launches wait for ever."""
    if layer_plan(SMOLLM2, torch.bfloat16, GpuTraits.of(torch.device("cuda"))) is None:
        pytest.skip("no Hopper GPU")
    run = subprocess.run(
        [sys.executable, __file__],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr


def launch_in_two_streams() -> None:
    """Raises AssertionError where bits differ."""
    traits = GpuTraits.of(torch.device("cuda"))
    plan = layer_plan(SMOLLM2, torch.bfloat16, traits)
    assert plan is not None
    layers = [OneTokenLayer.random(plan.sizes, "cuda") for _ in range(2)]
    expected = [layer.finish_with_many_kernels(traits) for layer in layers]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in layers]
    results: list[list[list[torch.Tensor]]] = [[] for _ in layers]
    for _ in range(20):
        for layer, stream, found in zip(layers, streams, results, strict=True):
            with torch.cuda.stream(stream):
                found.append(layer.finish(plan, traits, times=50))
    torch.cuda.synchronize()
    for found, theirs in zip(results, expected, strict=True):
        for ours in found:
            assert all(torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in zip(ours, theirs, strict=True))


if __name__ == "__main__":
    launch_in_two_streams()
