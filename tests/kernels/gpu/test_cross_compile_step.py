"""Sampling and the beginning of a step, compiled for GPUs that are not there. Nothing runs."""

import pytest
import torch

pytest.importorskip("triton")

from cross_compile import AMPERE, HOPPER, launches_compiled_for
from triode.kernels.gpu_traits import GpuTraits
from triode.kernels.sample.gpu import SampleWorkspace, SlotColumns, sample
from triode.kernels.step.gpu import begin_decode, embed, gather_tables, scatter

pytestmark = pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")

GPUS = pytest.mark.parametrize("traits", [AMPERE, HOPPER], ids=["sm80", "sm90"])


def indices(*size: int) -> torch.Tensor:
    return torch.zeros(*size, dtype=torch.int32)


@GPUS
def test_sampling_compiles(traits: GpuTraits) -> None:
    long, double = torch.zeros(9, dtype=torch.int64), torch.zeros(9, dtype=torch.float64)
    columns = SlotColumns(indices(9), indices(9), long, indices(9), torch.zeros(9), indices(9), double, double)
    workspace = SampleWorkspace.allocate(4, 152_064, torch.device("cpu"))
    with launches_compiled_for(traits) as compiled:
        sample(torch.zeros(4, 152_064), indices(4), indices(4), columns, workspace, indices(4), 8, traits)
    assert [kernel.metadata.name for kernel in compiled] == ["peaks", "weigh", "truncate", "choose"]


@GPUS
def test_the_beginning_of_a_step_compiles(traits: GpuTraits) -> None:
    embed_VD, residual = (torch.zeros(rows, 3584, dtype=torch.bfloat16) for rows in (100, 4))
    with launches_compiled_for(traits) as compiled:
        scatter(indices(100), indices(20), traits)
        begin_decode(
            *(indices(4), indices(9), indices(9), indices(9, 64), embed_VD, residual),
            *(indices(4), indices(4), indices(4), indices(4, 64), 16, traits),
        )
        embed(indices(4), indices(9), embed_VD, residual, traits)
        gather_tables(indices(4), indices(4), indices(9, 64), indices(4, 64), 16, traits)
    assert [kernel.metadata.name for kernel in compiled] == [
        "scatter_pairs",
        "begin_rows",
        "embed_tokens",
        "copy_tables",
    ]
