"""What a launcher must know about the GPU it launches on, as one value.

Launchers take it as an argument instead of asking the driver: a launch inside a CUDA graph capture asks nothing, and a
test describes any GPU, or Triton's interpreter, without having one.
"""

import dataclasses

import torch


@dataclasses.dataclass(frozen=True)
class GpuTraits:
    """The facts of one GPU that change how a kernel is launched."""

    num_sms: int
    """Streaming multiprocessors: how many programs it takes to fill the GPU."""
    shared_memory_bytes: int
    """The most shared memory one program may use."""
    dependent_launch: bool
    """Whether a kernel may start while its predecessor drains (programmatic dependent launch: SM90 and later)."""
    has_fp8: bool
    """Whether `float8_e4m3fn` converts in hardware (SM89 and later)."""
    warp_group_products: bool = False
    """Whether the tensor cores multiply for groups of four warps (`wgmma`: SM90 alone)."""
    interpreted: bool = False
    """Kernels run in Triton's interpreter, whose bfloat16 arithmetic is wrong: products are taken in float32."""

    @classmethod
    def of(cls, device: torch.device) -> "GpuTraits":
        """The traits of a CUDA device.

        Raises:
            ValueError: the GPU is older than compute capability 8.0.
        """
        properties = torch.cuda.get_device_properties(device)
        capability = (properties.major, properties.minor)
        if capability < (8, 0):
            raise ValueError(f"compute capability must be >= 8.0, got {properties.major}.{properties.minor}")
        return cls(
            num_sms=properties.multi_processor_count,
            shared_memory_bytes=properties.shared_memory_per_block_optin,  # type: ignore[attr-defined]  # torch's stub lacks it
            dependent_launch=capability >= (9, 0),
            has_fp8=capability >= (8, 9),
            warp_group_products=properties.major == 9,
        )

    @property
    def launch_options(self) -> dict[str, bool]:
        """Keyword arguments of every launch.

        No multiply-add is fused but where a kernel says so: the compiler's choices would become part of the result.
        """
        options = {"enable_fp_fusion": False}
        return options | {"launch_pdl": True} if self.dependent_launch else options


INTERPRETER = GpuTraits(num_sms=4, shared_memory_bytes=1 << 20, dependent_launch=False, has_fp8=True, interpreted=True)
"""Triton's interpreter (`TRITON_INTERPRET=1`) as a GPU of four multiprocessors."""
