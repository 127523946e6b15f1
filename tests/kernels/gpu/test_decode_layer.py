"""A layer of one token in one kernel: compiled for a GPU that is not there; and on one, the bits of the kernels of many tokens."""

import dataclasses

import pytest
import torch

pytest.importorskip("triton")

from cross_compile import ADA, AMPERE, HOPPER, fits, launches_compiled_for
from one_token_layers import OneTokenLayer
from triode.kernels.decode_layer.gpu import COUNTERS
from triode.kernels.decode_layer.layer import LINE_WORDS
from triode.kernels.decode_layer.plan import CHUNK_FEATURES, MEASURED, Heights, LayerPlan, LayerSizes, layer_plan
from triode.kernels.gpu_traits import GpuTraits

pytestmark = pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")

QWEN_7B = LayerSizes(hidden=3584, intermediate=18944, num_heads=28, num_kv_heads=4, head_dim=128)
LLAMA_8B = LayerSizes(hidden=4096, intermediate=14336, num_heads=32, num_kv_heads=8, head_dim=128)
SIZES = {
    "qwen2.5-7b": QWEN_7B,
    "llama-3.1-8b": LLAMA_8B,
    "qwen2.5-0.5b": LayerSizes(hidden=896, intermediate=4864, num_heads=14, num_kv_heads=2, head_dim=64),
    "smollm2-135m": LayerSizes(hidden=576, intermediate=1536, num_heads=9, num_kv_heads=3, head_dim=64),
}
SMALL = SIZES["smollm2-135m"]
# Whatever is refused on it, shared memory is not the reason.
ROOMY = dataclasses.replace(HOPPER, shared_memory_bytes=2**20)
SERVED = pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)


def plan_of(sizes: LayerSizes, traits: GpuTraits = HOPPER, dtype: torch.dtype = torch.bfloat16) -> LayerPlan:
    plan = layer_plan(sizes, dtype, traits)
    assert plan is not None
    return plan


@SERVED
def test_a_plan_fills_shared_memory(sizes: LayerSizes) -> None:
    plan = plan_of(sizes)
    assert plan.widest >= max(sizes.intermediate, sizes.attended, plan.hidden_padded)
    assert plan.stages >= 8


def test_other_gpus_types_and_sizes_have_no_plan() -> None:
    for traits in (AMPERE, ADA):
        assert layer_plan(QWEN_7B, torch.bfloat16, traits) is None
    assert layer_plan(QWEN_7B, torch.float32, HOPPER) is None
    assert layer_plan(dataclasses.replace(QWEN_7B, intermediate=18960), torch.bfloat16, HOPPER) is None
    assert layer_plan(dataclasses.replace(QWEN_7B, head_dim=96), torch.bfloat16, HOPPER) is None


@pytest.mark.parametrize(
    ("sizes", "heights", "is_served"),
    [
        (dataclasses.replace(SMALL, hidden=640), Heights(16, 32, 16, 32), True),
        (dataclasses.replace(SMALL, hidden=648), Heights(8, 32, 8, 32), False),
        (dataclasses.replace(SMALL, intermediate=1544), Heights(16, 16, 16, 32), False),
        (dataclasses.replace(SMALL, num_heads=5, head_dim=24), Heights(16, 32, 16, 24), False),
        (dataclasses.replace(SMALL, intermediate=63 * CHUNK_FEATURES), Heights(16, 32, 16, 32), True),
        (dataclasses.replace(SMALL, intermediate=63 * CHUNK_FEATURES + 16), Heights(16, 32, 16, 32), False),
    ],
)
def test_a_plan_is_refused_where_the_kernel_would_miss_features(
    sizes: LayerSizes, heights: Heights, is_served: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(MEASURED, (sizes.hidden, sizes.intermediate), heights)
    assert (layer_plan(sizes, torch.bfloat16, ROOMY) is not None) == is_served


def test_each_product_that_programs_wait_for_has_a_counter_in_a_line_of_its_own() -> None:
    """After o, gate-up and down: what `layer.py` counts in."""
    assert 3 * LINE_WORDS.value == COUNTERS


@pytest.mark.parametrize(
    ("sizes", "dtype"),
    [*((sizes, torch.bfloat16) for sizes in SIZES.values()), (SIZES["smollm2-135m"], torch.float16)],
    ids=[*SIZES, "smollm2-135m-float16"],
)
def test_it_compiles_for_hopper_and_fits(sizes: LayerSizes, dtype: torch.dtype) -> None:
    with torch.device("meta"):
        layer = OneTokenLayer.random(sizes, "meta", dtype=dtype, bias=sizes is QWEN_7B)
    with launches_compiled_for(HOPPER) as compiled:
        layer.finish(plan_of(sizes, dtype=dtype), HOPPER)
        layer.finish(plan_of(sizes, dtype=dtype), HOPPER, last=True)
    assert fits(compiled, HOPPER)
    # The last layer takes the same kernel.
    assert compiled[0] is compiled[1]


@pytest.mark.gpu
@pytest.mark.parametrize("last", [False, True], ids=["projects", "last"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@SERVED
def test_it_has_the_bits_of_the_kernels_of_many_tokens(sizes: LayerSizes, dtype: torch.dtype, last: bool) -> None:
    traits = GpuTraits.of(torch.device("cuda"))
    plan = layer_plan(sizes, dtype, traits)
    if plan is None:
        pytest.skip("no Hopper GPU")
    torch.manual_seed(0)
    layer = OneTokenLayer.random(sizes, "cuda", dtype=dtype, bias=sizes is QWEN_7B)
    expected = layer.finish_with_many_kernels(traits, last=last)
    # Counters that never stop growing wrap after an hour.
    for times, count in ((1, 0), (3, 2**31 - 200), (3, -200)):
        results = layer.finish(plan, traits, last=last, times=times, count=count)
        for ours, theirs in zip(results, expected, strict=True):
            assert torch.equal(ours.nan_to_num(7), theirs.nan_to_num(7))
