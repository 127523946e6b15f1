"""Right, and the same bits for every batch, on a real GPU. `benchmarks/gpu_kernels.py` checks more before it times."""

import itertools
from typing import Any

import pytest
import torch

from paged_sequences import PagedSequences, attention_oracle, paged_sequences, relative_error

pytest.importorskip("triton")

from triode.kernels.gpu_traits import GpuTraits
from triode.kernels.linear.algorithms import MEASURED, MEASURED_WITH
from triode.kernels.linear.blas import blas_of, in_order, linear_blas, linear_torch, split_k_refused
from triode.kernels.linear.cublaslt import CublasLt, CublasLtError, loaded_library
from triode.kernels.linear.gpu import linear_sequential
from triode.kernels.linear.proof import prove
from triode.kernels.linear.tiles import QKV_FUSED_TOKENS, linear_tile, qkv_tile, swiglu_tile
from triode.kernels.paged_attention.gpu import AttentionWorkspace, paged_attention
from triode.kernels.paged_attention.tiles import AttentionTile
from triode.kernels.qkv_epilogue.fused import qkv_fused
from triode.kernels.qkv_epilogue.gpu import qkv_epilogue
from triode.kernels.rms_norm.gpu import add_rms_norm
from triode.kernels.swiglu.gpu import swiglu

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore")]

LENGTH = 1300


@pytest.fixture(scope="module")
def traits() -> GpuTraits:
    return GpuTraits.of(torch.device("cuda"))


def attend(
    rows: PagedSequences,
    first: int,
    last: int,
    start: torch.Tensor,
    query_start: torch.Tensor,
    traits: GpuTraits,
    *,
    window_tokens: int = 0,
    tile: AttentionTile | None = None,
) -> torch.Tensor:
    """Query tokens first..last of the one sequence, as rows that begin at `start`."""
    q = rows.q_TNH[first:last]
    out = torch.full_like(q, torch.nan)
    num_kv_heads = rows.key_PBKH.shape[2]
    most = int(query_start.diff().max())
    workspace = AttentionWorkspace.allocate(len(start) * num_kv_heads, 3, 8, q.shape[2], q.device)
    paged_attention(
        q,
        rows.key_PBKH,
        rows.value_PBKH,
        rows.block_table_RC.expand(len(start), -1) if len(rows.block_table_RC) == 1 else rows.block_table_RC,
        query_start,
        start,
        out,
        scale=rows.scale,
        max_query_tokens=most,
        traits=traits,
        window_tokens=window_tokens,
        num_splits=3 if most == 1 else 1,
        workspace=workspace,
        tile=tile,
    )
    return out


def called_directly() -> CublasLt:
    """cuBLASLt; the test is skipped where it cannot be called."""
    blas = blas_of(torch.device("cuda"))
    if not isinstance(blas, CublasLt):
        pytest.skip(blas)
    return blas


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device="cuda")


@pytest.mark.parametrize("sharpness", [1, 8])
@pytest.mark.parametrize("kv_dtype", [torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), [(14, 2, 128), (9, 3, 64), (4, 2, 80)])
def test_chunks_and_decode_rows_give_the_bits_of_one_prefill(
    num_heads: int, num_kv_heads: int, head_dim: int, kv_dtype: torch.dtype, sharpness: int, traits: GpuTraits
) -> None:
    """With wide scores too, whose weights do not add up without rounding: then the order of their sum shows."""
    if kv_dtype == torch.float8_e4m3fn and not traits.has_fp8:
        pytest.skip("no hardware float8")
    rows = paged_sequences(
        [0],
        [LENGTH],
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        dtype=torch.bfloat16,
        kv_dtype=kv_dtype,
        device="cuda",
    )
    rows.q_TNH.mul_(sharpness)
    whole = attend(rows, 0, LENGTH, int32(0), int32(0, LENGTH), traits)
    assert relative_error(whole, attention_oracle(rows)) < 6e-3
    for first, last in itertools.pairwise((0, 37, 512, 1000, 1001, LENGTH)):
        chunk = attend(rows, first, last, int32(first), int32(0, last - first), traits)
        assert torch.equal(chunk, whole[first:last])
    first = LENGTH - 900
    decoded = attend(rows, first, LENGTH, int32(*range(first, LENGTH)), int32(*range(901)), traits)
    assert torch.equal(decoded, whole[first:])


@pytest.mark.parametrize("window_tokens", [0, 300])
@pytest.mark.parametrize("block_size", [16, 64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_long_rows_have_the_bits_of_every_tile_and_ignore_what_nobody_wrote(
    dtype: torch.dtype, block_size: int, window_tokens: int, traits: GpuTraits
) -> None:
    rows = paged_sequences(
        # Of the last row's 36 tokens none is left for the third tile that there may be of it.
        [0, 600, 64, 63, 511, 900],
        [333, 1, 0, 130, 2, 36],
        num_heads=14,
        head_dim=128,
        block_size=block_size,
        dtype=dtype,
        device="cuda",
    )
    rows.q_TNH.mul_(8)
    call = (rows, 0, len(rows.q_TNH), rows.start_R, rows.query_start_R1, traits)
    whole = attend(*call, window_tokens=window_tokens)
    assert relative_error(whole, attention_oracle(rows, window_tokens)) < 6e-3
    for tile in (AttentionTile(16, 1, 1), AttentionTile(64, 4, 2), AttentionTile(128, 8, 2)):
        assert torch.equal(attend(*call, window_tokens=window_tokens, tile=tile), whole)


@pytest.mark.parametrize(
    ("out_features", "in_features"),
    [(4608, 3584), (1152, 896), (896, 4864), (960, 576), (576, 1536), (4096, 14336), (512, 2560)],
)
def test_cublaslt_in_order_agrees_with_the_triton_kernel_or_is_named(
    out_features: int, in_features: int, traits: GpuTraits
) -> None:
    weight = torch.randn(out_features, in_features, device="cuda").bfloat16() * 0.02
    proof = prove(weight, traits, most_tokens=1024)
    assert (proof.triton_tokens is None) == bool(proof.differing_tokens)
    x = torch.randn(64, in_features, device="cuda").bfloat16()
    outs = []
    for num_tokens in (1, 8, 16, 32, 33, 64):
        out = torch.full((num_tokens, out_features), torch.nan, dtype=torch.bfloat16, device="cuda")
        linear_sequential(x[:num_tokens], weight, out, linear_tile(out_features, in_features, num_tokens), traits)
        outs.append(out)
    assert all(torch.equal(out[:1], outs[0]) and torch.equal(out, outs[-1][: len(out)]) for out in outs)
    assert relative_error(outs[-1], x.double() @ weight.double().T) < 3e-3


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim", "hidden"),
    [(28, 4, 128, 3584), (32, 8, 128, 4096), (14, 2, 64, 896), (9, 3, 64, 576)],
)
def test_the_fused_projection_gives_the_bits_of_product_and_epilogue(
    num_heads: int, num_kv_heads: int, head_dim: int, hidden: int, with_bias: bool, traits: GpuTraits
) -> None:
    width = (num_heads + 2 * num_kv_heads) * head_dim
    weight = torch.randn(width, hidden, device="cuda").bfloat16() * 0.03
    bias = torch.randn(width, device="cuda").bfloat16() if with_bias else None
    angle = torch.rand(64, head_dim // 2, device="cuda") * 6
    for num_tokens in (1, 5, QKV_FUSED_TOKENS):
        x = torch.randn(num_tokens, hidden, device="cuda").bfloat16()
        position = torch.randint(0, 64, (num_tokens,), device="cuda", dtype=torch.int32)
        slot = (torch.randperm(32, device="cuda")[:num_tokens] + 16).int()
        outs = []
        for fused in (False, True):
            qkv = torch.full((num_tokens, width), torch.nan, dtype=torch.bfloat16, device="cuda")
            key, value = (torch.zeros(3, 16, num_kv_heads, head_dim, dtype=torch.bfloat16, device="cuda") for _ in "kv")
            places = (angle.cos(), angle.sin(), position, slot, key, value, num_heads)
            if fused:
                q = qkv_fused(x, weight, qkv, *places, qkv_tile(width // 2, hidden), traits, bias_E=bias)
            else:
                linear_sequential(x, weight, qkv, linear_tile(width, hidden, num_tokens), traits)
                q = qkv_epilogue(qkv, *places, traits, bias_E=bias)
            outs.append((q, key, value))
        assert all(torch.equal(got, want) for got, want in zip(outs[1], outs[0], strict=True))


@pytest.mark.parametrize("shape", MEASURED)
def test_every_named_algorithm_keeps_the_bits(shape: tuple[int, int], traits: GpuTraits) -> None:
    weight = torch.randn(shape, device="cuda").bfloat16() * 0.02
    proof = prove(weight, traits)
    assert not proof.differing_tokens, str(proof)


@pytest.mark.parametrize("shape", MEASURED)
def test_what_is_named_is_offered_by_the_library_it_was_measured_with(shape: tuple[int, int]) -> None:
    """And keeps the bits: not because the heuristic took its place."""
    lt, capability = called_directly(), torch.cuda.get_device_capability()
    if capability != (9, 0) or not lt.version.startswith(MEASURED_WITH):
        pytest.skip(f"cuBLASLt {lt.version} on compute capability {capability}")
    named = {most: algorithm for most, algorithm in MEASURED[shape].items() if algorithm is not None}
    # Heads write float32.
    out_dtype = torch.float32 if shape[0] > 100_000 else torch.bfloat16
    weight = torch.randn(shape, device="cuda").bfloat16() * 0.02
    x = torch.randn(max(named), shape[1], device="cuda").bfloat16()
    expected, out = (torch.full((size, shape[0]), torch.nan, device="cuda", dtype=out_dtype) for size in (16, len(x)))
    linear_sequential(x[:16], weight, expected, linear_tile(*shape, 16), GpuTraits.of(x.device))
    num_offered = 0
    for most, algorithm in named.items():
        out.fill_(torch.nan)
        try:
            lt.multiply(x[:most], weight, out[:most], algorithm=algorithm)
        except CublasLtError:
            continue
        num_offered += 1
        assert torch.equal(out[:16], expected), f"{algorithm} of {most} tokens"
    assert num_offered > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_cublaslt_adds_a_bias_before_it_rounds_and_writes_float32(dtype: torch.dtype) -> None:
    x, weight, bias = (torch.randn(size, device="cuda").to(dtype) for size in ((100, 1024), (2048, 1024), (2048,)))
    exact = x.double() @ weight.double().T
    for out_dtype, with_bias in itertools.product({dtype, torch.float32}, (False, True)):
        out = torch.full((100, 2048), torch.nan, dtype=out_dtype, device="cuda")
        with in_order(x.device):
            linear_blas(x, weight, out, bias if with_bias else None)
        assert relative_error(out, exact + bias.double() if with_bias else exact) < 3e-3


@pytest.mark.parametrize("first", [0, 8, 4, 1])
def test_cublaslt_takes_rows_and_addresses_that_are_apart(first: int, traits: GpuTraits) -> None:
    x = torch.randn(100, 1032, device="cuda").bfloat16()[:, first : first + 1024]
    weight = torch.randn(2048, 1024, device="cuda").bfloat16()
    out, expected = (torch.full((100, width), torch.nan, device="cuda").bfloat16() for width in (4096, 2048))
    written = out[:, first : first + 2048]
    with in_order(x.device):
        linear_blas(x, weight, written)
    linear_sequential(x, weight, expected, linear_tile(2048, 1024, 100), traits)
    # Kernels for addresses that are no multiples of 16 bytes, which no step has, may add in another order.
    assert torch.equal(written, expected) if first % 8 == 0 else relative_error(written, expected) < 3e-3
    assert out.isnan().sum() == 100 * 2048


def test_a_captured_product_gives_its_bits_again_whatever_was_allocated_since(traits: GpuTraits) -> None:
    called_directly()
    path = loaded_library()
    assert path is not None
    lt = CublasLt(path, torch.device("cuda"))
    new_plan = lt._plan

    def plan_with_workspace(*product: Any) -> Any:
        plan = new_plan(*product)
        # More than a kernel needs is harmless; many need 4 bytes, and some none.
        plan.workspace_bytes = max(plan.workspace_bytes, 4096)
        return plan

    lt._plan = plan_with_workspace  # type: ignore[assignment]
    x, weight = torch.randn(4096, 3584, device="cuda").bfloat16(), torch.randn(4608, 3584, device="cuda").bfloat16()
    out = torch.full((4096, 4608), torch.nan, device="cuda").bfloat16()
    lt.multiply(x, weight, out)
    expected = out.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        lt.multiply(x, weight, out)
    others = [torch.randn(1024, device="cuda") for _ in range(8)]
    for _ in range(3):
        out.fill_(torch.nan)
        graph.replay()
        assert torch.equal(out, expected)
    assert all(other.isfinite().all() for other in others)


def test_cublaslt_called_directly_leaves_the_process_as_it_is() -> None:
    called_directly()
    device = torch.device("cuda")
    before = torch.backends.cuda.preferred_blas_library()
    with in_order(device):
        assert torch.backends.cuda.preferred_blas_library() == before
        assert torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction_split_k


def test_the_proof_can_fail(traits: GpuTraits) -> None:
    # Elsewhere the switches that torch's products need would keep these, too, in order.
    called_directly()
    weight = torch.randn(1024, 16384, device="cuda").bfloat16() * 0.02
    assert prove(weight, traits, product=linear_torch).differing_tokens


def test_the_process_wide_switches_are_put_back() -> None:
    matmul = torch.backends.cuda.matmul

    def switches() -> tuple[object, ...]:
        return (
            torch.backends.cuda.preferred_blas_library(),
            matmul.allow_bf16_reduced_precision_reduction,
            matmul.allow_bf16_reduced_precision_reduction_split_k,
        )

    before = switches()
    with split_k_refused():
        assert switches() != before
    assert switches() == before


def test_fused_swiglu_gives_the_bits_of_cublaslt_and_the_separate_kernel(traits: GpuTraits) -> None:
    x = torch.randn(128, 1024, device="cuda").bfloat16()
    weight = torch.randn(8192, 1024, device="cuda").bfloat16() * 0.03
    gate_up, separate, fused = (
        torch.full((tokens, width), torch.nan, dtype=torch.bfloat16, device="cuda")
        for tokens, width in ((128, 8192), (128, 4096), (16, 4096))
    )
    with in_order(x.device):
        linear_blas(x, weight, gate_up)
    swiglu(gate_up, separate, traits)
    linear_sequential(x[:16], weight, fused, swiglu_tile(4096, 1024, 16), traits, swiglu=True)
    assert torch.equal(fused, separate[:16])


def test_a_norm_is_the_same_alone_and_in_a_batch(traits: GpuTraits) -> None:
    x, residual, weight = (torch.randn(300, 896, device="cuda").bfloat16() for _ in range(3))
    outs = [torch.full_like(x, torch.nan), torch.full_like(x[:1], torch.nan)]
    add_rms_norm(x, residual.clone(), weight[0], 1e-6, outs[0], traits)
    add_rms_norm(x[7:8], residual[7:8].clone(), weight[0], 1e-6, outs[1], traits)
    assert torch.equal(outs[0][7:8], outs[1])
