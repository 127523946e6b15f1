"""Everything that the steps of a model launch, compiled for GPUs that are not there. Nothing runs."""

import pytest
import torch

pytest.importorskip("triton")

from absent_world import AbsentWorld
from cross_compile import ADA, AMPERE, HOPPER, fits, launches_compiled_for
from triode.kernels.gpu_traits import GpuTraits
from triode.models.random_model import RANDOM_NAMES

pytestmark = pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")

GPUS = pytest.mark.parametrize("traits", [AMPERE, HOPPER], ids=["sm80", "sm90"])
MODELS = [
    *((name, torch.bfloat16) for name in RANDOM_NAMES),
    *(("tiny", torch.float16), ("llama-3.1-8b", torch.float16)),
    *(("tiny", torch.float32), ("smollm2-135m", torch.float32), ("llama-3.1-8b", torch.float32)),
]
KERNELS = {
    *("embed_tokens", "scatter_pairs", "begin_rows", "copy_tables", "place_last_tokens", "pick_tokens"),
    *("normalise_row", "linear_in_order", "project_qkv", "finish_qkv", "attend", "gate_columns"),
    *("peaks", "weigh", "truncate", "choose"),
}


@GPUS
def test_each_kind_of_kernel_compiles_for_a_large_model(traits: GpuTraits) -> None:
    with launches_compiled_for(traits, one_of_a_kind=True) as compiled:
        AbsentWorld("qwen2.5-7b", torch.bfloat16, traits).play()
    own = {"attend_long_rows", "merge_long_rows", "decode_layer"} if traits.warp_group_products else set()
    assert {kernel.metadata.name for kernel in compiled} == KERNELS | own
    assert fits(compiled, traits)


@pytest.mark.slow
@GPUS
@pytest.mark.parametrize(("model", "dtype"), MODELS)
def test_every_kernel_compiles_for_every_model(model: str, dtype: torch.dtype, traits: GpuTraits) -> None:
    with launches_compiled_for(traits) as compiled:
        AbsentWorld(model, dtype, traits).play()
    assert fits(compiled, traits)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["smollm2-135m", "llama-3.1-8b"])
def test_every_kernel_fits_a_gpu_with_little_shared_memory(model: str) -> None:
    with launches_compiled_for(ADA) as compiled:
        AbsentWorld(model, torch.bfloat16, ADA).play()
    assert fits(compiled, ADA)
