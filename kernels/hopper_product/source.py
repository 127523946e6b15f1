"""What NVRTC is told of a tile: `product.cu`, its constants, and the one instruction that C++ cannot spell.

The tensor cores' instruction names each of a thread's sums as an operand, up to 128 of them, so its text depends on how
wide it is.
"""

from collections.abc import Mapping
from functools import cache
from pathlib import Path

import torch

from triode.kernels.hopper_product.tiles import Ending, ProductTile

SOURCE = Path(__file__).with_name("product.cu")
KERNEL = "product"
_TYPES = {torch.float16: "f16", torch.bfloat16: "bf16"}

_INSTRUCTION = """
// sums (+)= a b, for 64 rows of a, {columns} of b and 16 features; `add` is 0 where sums begin.
__device__ __forceinline__ void multiply(float (&sums)[{num_sums}], Descriptor a, Descriptor b, int add) {{
    asm volatile(
        "{{\\n.reg .pred add;\\nsetp.ne.b32 add, %{add}, 0;\\n"
        "wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.{type}.{type} {{{registers}}}, %{a}, %{b}, add, 1, 1, 0, 0;\\n}}"
        : {sums} : "l"(a), "l"(b), "r"(add));
}}
"""


@cache
def source() -> str:
    """The kernel's text."""
    return SOURCE.read_text()


def headers(tile: ProductTile, dtype: torch.dtype) -> Mapping[str, str]:
    """What it includes, by name."""
    num_sums = tile.columns // 2
    instruction = _INSTRUCTION.format(
        columns=tile.columns,
        type=_TYPES[dtype],
        num_sums=num_sums,
        registers=", ".join(f"%{index}" for index in range(num_sums)),
        sums=", ".join(f'"+f"(sums[{index}])' for index in range(num_sums)),
        a=num_sums,
        b=num_sums + 1,
        add=num_sums + 2,
    )
    return {"multiply.h": instruction}


def options(tile: ProductTile, ending: Ending, dtype: torch.dtype) -> list[str]:
    """Of the compiler."""
    constants = {
        "GATED": int(ending is Ending.SWIGLU),
        "ADDS": int(ending is Ending.ADD),
        "CLUSTER": tile.cluster,
        "CONSUMERS": tile.consumers,
        "SUBTILES": tile.subtiles,
        "PARTS": tile.parts,
        "COLUMNS": tile.columns,
        "STAGES": tile.num_stages,
        "SHARES_WEIGHT": int(tile.shares_weight),
        "BOX_GROUPS": tile.box_groups(ending),
        "FLOAT16": int(dtype == torch.float16),
    }
    return ["--gpu-architecture=sm_90a", "--std=c++17", *(f"-D{name}={value}" for name, value in constants.items())]
