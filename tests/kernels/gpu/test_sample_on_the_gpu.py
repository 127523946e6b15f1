"""Sampling at full size on a GPU, each draw against float64."""

import pytest
import torch

from explained_draws import is_explained

pytest.importorskip("triton")

from triode.kernels.gpu_traits import GpuTraits
from triode.kernels.philox import reference as philox
from triode.kernels.sample.gpu import SampleWorkspace, SlotColumns, sample

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(
    "options", [(1.0, 0, 1.0, 0.0), (0.6, 50, 1.0, 0.0), (0.8, 0, 0.9, 0.0), (1.3, 100, 0.95, 0.01)]
)
def test_every_draw_is_one_that_float64_explains(options: tuple[float, int, float, float]) -> None:
    device, rows, vocab = torch.device("cuda"), 256, 152_064
    temperature, top_k, top_p, min_p = options
    logits = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(2)) * 2.5
    slots = SlotColumns(
        last_token_S=torch.zeros(rows + 1, dtype=torch.int32, device=device),
        position_S=torch.zeros(rows + 1, dtype=torch.int32, device=device),
        seed_S=torch.arange(rows + 1, device=device) * 0x123456789,
        sample_index_S=torch.zeros(rows + 1, dtype=torch.int32, device=device),
        temperature_S=torch.full((rows + 1,), temperature, device=device),
        top_k_S=torch.full((rows + 1,), top_k, dtype=torch.int32, device=device),
        top_p_S=torch.full((rows + 1,), top_p, dtype=torch.float64, device=device),
        min_p_S=torch.full((rows + 1,), min_p, dtype=torch.float64, device=device),
    )
    slot_R = torch.arange(rows, dtype=torch.int32, device=device)
    token_R = torch.full((rows,), -99, dtype=torch.int32, device=device)
    workspace = SampleWorkspace.allocate(rows, vocab, device)
    sample(logits.to(device), slot_R, slot_R + 5, slots, workspace, token_R, rows, GpuTraits.of(device))
    uniform = philox.uniform(slots.seed_S.cpu()[:rows], torch.zeros(rows, dtype=torch.int64), torch.arange(rows) + 5)
    tokens = token_R.cpu().tolist()
    assert all(
        is_explained(logits[row], tokens[row], float(uniform[row]), temperature, top_k, top_p, min_p)
        # Each takes float64 a tenth of a second on the CPU.
        for row in range(0, rows, 4)
    )
