"""What this machine has: its processor and memory, as far as this process may use them, and its GPUs."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import msgspec

from triode.cache.memory import available_memory_bytes
from triode.kernels.native.cpus import quota_cores

# As /proc/cpuinfo spells them; those that a fast CPU kernel can be built on.
_FEATURES = (
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx512bw",
    "avx512vl",
    "avx512_vnni",
    "avx_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_tile",
    "amx_bf16",
    "amx_int8",
    "asimd",
    "asimddp",
    "bf16",
    "i8mm",
    "sve",
)
_PACKAGES = ("torch", "triton", "trio", "msgspec", "numpy", "tokenizers", "safetensors", "gguf", "transformers")


class Processor(msgspec.Struct, frozen=True):
    """The CPU."""

    name: str
    num_cores: int
    """In the machine, hardware threads included."""
    num_allowed_cores: int
    """That this process may run on (affinity)."""
    quota_cores: float | None
    """How many cores' worth of time its control group gets; None without a limit."""
    features: tuple[str, ...]


class Memory(msgspec.Struct, frozen=True):
    """Main memory."""

    total_bytes: int
    available_bytes: int
    """That this process may still take, the limits of its control groups included."""


class Gpu(msgspec.Struct, frozen=True):
    """One CUDA device."""

    name: str
    compute_capability: str
    total_bytes: int
    free_bytes: int


def read_versions() -> dict[str, str]:
    """Of Python and of the packages that results depend on; those not installed are left out."""
    found = {"python": platform.python_version()}
    for package in ("triode", *_PACKAGES):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def read_processor(root: Path = Path("/")) -> Processor:
    """The CPU. `root` is where `proc` and `sys` are looked for."""
    info = _cpuinfo(root)
    flags = set(info.get("flags", info.get("Features", "")).split())
    return Processor(
        name=info.get("model name", platform.processor() or platform.machine()),
        num_cores=os.cpu_count() or 1,
        num_allowed_cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        quota_cores=quota_cores(root),
        features=tuple(feature for feature in _FEATURES if feature in flags),
    )


def read_memory() -> Memory:
    """Main memory."""
    return Memory(
        total_bytes=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        available_bytes=available_memory_bytes(),
    )


def read_gpus() -> tuple[Gpu, ...]:
    """The GPUs that torch can use."""
    import torch

    gpus = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free_bytes, total_bytes = torch.cuda.mem_get_info(index)
        gpus.append(
            Gpu(
                name=properties.name,
                compute_capability=f"{properties.major}.{properties.minor}",
                total_bytes=total_bytes,
                free_bytes=free_bytes,
            )
        )
    return tuple(gpus)


def device_name(device: str) -> str:
    """The model of the device a benchmark ran on: "cpu" or "cuda" says too little in a table."""
    if device.startswith("cuda"):
        return read_gpus()[0].name
    processor = read_processor()
    return f"{processor.name}, {processor.num_allowed_cores} cores"


def _cpuinfo(root: Path) -> dict[str, str]:
    """The lines about the first core."""
    path = root / "proc/cpuinfo"
    if not path.exists():
        return {}
    first = path.read_text().split("\n\n", 1)[0]
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())}
