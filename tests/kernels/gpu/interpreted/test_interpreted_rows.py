import pytest
import torch

from paged_sequences import relative_error
from triode.kernels.gpu_traits import INTERPRETER
from triode.kernels.qkv_epilogue import gpu as epilogue_gpu
from triode.kernels.qkv_epilogue import reference as epilogue_reference
from triode.kernels.rms_norm import gpu as norm_gpu
from triode.kernels.rms_norm import reference as norm_reference


@pytest.mark.parametrize("hidden", [64, 576, 1000])
def test_add_rms_norm_agrees_with_the_reference(hidden: int) -> None:
    x, residual, weight = torch.randn(3, hidden).half(), torch.randn(3, hidden).half(), torch.randn(hidden).half()
    total, out = residual.clone(), torch.full((3, hidden), torch.nan, dtype=torch.float16)
    norm_gpu.add_rms_norm(x, total, weight, 1e-5, out, INTERPRETER)
    want = norm_reference.add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(total, residual)
    assert relative_error(out, want) < 1e-3


def test_rms_norm_reads_rows_that_lie_apart() -> None:
    x, weight, out = torch.randn(8, 64), torch.randn(64), torch.full((4, 64), torch.nan)
    norm_gpu.rms_norm(x[::2], weight, 1e-5, out, INTERPRETER)
    assert relative_error(out, norm_reference.rms_norm(x[::2], weight, 1e-5)) < 1e-6


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(("head_dim", "rotated"), [(64, 64), (80, 80), (80, 32), (128, 64)])
def test_the_qkv_epilogue_agrees_with_the_reference(head_dim: int, rotated: int, norm: bool) -> None:
    num_heads, num_kv_heads, num_tokens = 3, 1, 4
    qkv = torch.randn(num_tokens, (num_heads + 2 * num_kv_heads) * head_dim)
    angle = torch.rand(10, rotated // 2) * 6
    position, slot = torch.tensor([3, 7, 0, 9]), torch.tensor([17, 33, 60, 1])
    q_norm, k_norm = (torch.randn(head_dim) if norm else None for _ in range(2))
    bias = torch.randn(qkv.shape[1])
    pools = [[torch.zeros(4, 16, num_kv_heads, head_dim) for _ in range(2)] for _ in range(2)]
    tables = (angle.cos(), angle.sin(), position, slot)
    key, value = pools[0]
    want = epilogue_reference.qkv_epilogue(
        qkv, *tables, key, value, num_heads, bias_E=bias, q_norm_H=q_norm, k_norm_H=k_norm, eps=1e-5
    )
    key, value = pools[1]
    got = epilogue_gpu.qkv_epilogue(
        qkv, *tables, key, value, num_heads, INTERPRETER, bias_E=bias, q_norm_H=q_norm, k_norm_H=k_norm, eps=1e-5
    )
    assert relative_error(got, want) < 1e-6
    for reference, written in zip(*pools, strict=True):
        torch.testing.assert_close(written, reference, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kv_dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_keys_and_values_are_stored_in_the_type_of_the_cache(kv_dtype: torch.dtype) -> None:
    # Values that every type holds, and no rotation: the interpreter rounds wrongly to bfloat16 and float8.
    head_dim, position, slot = 64, torch.tensor([3, 7, 0]), torch.tensor([17, 33, 60])
    qkv = torch.randint(-7, 8, (3, 3 * head_dim)).float()
    cos, sin = torch.ones(10, head_dim // 2), torch.zeros(10, head_dim // 2)
    key, value = (torch.zeros(4, 16, 1, head_dim, dtype=kv_dtype) for _ in range(2))
    got = epilogue_gpu.qkv_epilogue(qkv, cos, sin, position, slot, key, value, 1, INTERPRETER)
    assert torch.equal(got[:, 0], qkv[:, :head_dim])
    for pool, stored in ((key, qkv[:, head_dim : 2 * head_dim]), (value, qkv[:, 2 * head_dim :])):
        rows = pool.float().view(-1, head_dim)
        assert torch.equal(rows[slot], stored)
        rows[slot] = 0
        assert not rows.any()


@pytest.mark.parametrize("norm", [False, True])
def test_the_qkv_epilogue_computes_in_float16(norm: bool) -> None:
    head_dim, num_tokens = 64, 4
    qkv, angle = torch.randn(num_tokens, 5 * head_dim).half(), torch.rand(10, head_dim // 2) * 6
    tables = (angle.cos(), angle.sin(), torch.tensor([3, 7, 0, 9]), torch.tensor([17, 33, 60, 1]))
    q_norm, k_norm = (torch.randn(head_dim).half() if norm else None for _ in range(2))
    bias = torch.randn(5 * head_dim).half()
    pools = [[torch.zeros(4, 16, 1, head_dim).half() for _ in range(2)] for _ in range(2)]
    key, value = pools[0]
    want = epilogue_reference.qkv_epilogue(
        qkv, *tables, key, value, 3, bias_E=bias, q_norm_H=q_norm, k_norm_H=k_norm, eps=1e-5
    )
    key, value = pools[1]
    got = epilogue_gpu.qkv_epilogue(
        qkv, *tables, key, value, 3, INTERPRETER, bias_E=bias, q_norm_H=q_norm, k_norm_H=k_norm, eps=1e-5
    )
    assert relative_error(got, want) < 2e-3
    for reference, written in zip(*pools, strict=True):
        assert relative_error(written, reference) < 2e-3
