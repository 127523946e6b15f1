"""`triode doctor`: what this machine offers, what Triode would use of it, and what is missing."""

import argparse
from importlib import import_module

import msgspec

from triode.engine.cli.machine import Gpu, Memory, Processor, read_gpus, read_memory, read_processor, read_versions
from triode.engine.cli.progress import shown_progress, stage
from triode.engine.cli.reading import measure_reading
from triode.errors import ModelNotFound

ON_GPU = "Triton; {} for products of many tokens where a check at loading finds the same bits"
ON_HOPPER = ON_GPU + "; {} for those that were measured"


class Report(msgspec.Struct, frozen=True):
    """Everything the doctor found."""

    versions: dict[str, str]
    processor: Processor
    memory: Memory
    gpus: tuple[Gpu, ...]
    device: str
    """What `--device auto` takes."""
    kernels: dict[str, str]
    """By dtype, what would compute."""
    passed_over: tuple[str, ...]
    """Why the CPU kernels are not built for a better instruction set that the processor has."""
    num_threads: int
    """Of one CPU operation, unless `--num-threads` says otherwise."""
    held_cpus: tuple[int, ...]
    """On which threads of engines that run now stay: no other engine's threads are pinned to them."""
    read_bytes_per_s: float | None
    """How fast they read memory together; None where the CPU kernels are not to be had."""
    models: dict[str, str]
    """Built-in models: where they are, or how to get them."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """How to print."""
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def main(arguments: argparse.Namespace) -> int:
    """Look, and print."""
    with shown_progress() as progress, stage(progress, "Importing torch"):
        import_module("torch")
    report = examine()
    print(msgspec.json.encode(report).decode() if arguments.json else "\n".join(_lines(report)))
    return 0


def examine() -> Report:
    """Look at the machine and at the installation."""
    import torch

    from triode.kernels.hopper_product.nvrtc import describe_nvrtc
    from triode.kernels.linear.blas import describe_blas
    from triode.kernels.native.cpus import allowed_cpus, usable_threads
    from triode.kernels.native.places import held_elsewhere
    from triode.models.cpu import describe_auto_kernels, find_native
    from triode.models.loader import resolve_device

    device = resolve_device("auto")
    num_threads = usable_threads(torch.get_num_threads())
    with shown_progress() as progress:
        native = find_native(progress)

    def kernels(dtype: torch.dtype) -> str:
        if device.type == "cpu":
            return describe_auto_kernels(dtype, native)
        is_hopper = torch.cuda.get_device_capability(device) == (9, 0)
        on_gpu = ON_HOPPER if is_hopper and dtype != torch.float32 else ON_GPU
        return on_gpu.format(describe_blas(device), describe_nvrtc())

    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    return Report(
        versions=read_versions(),
        processor=read_processor(),
        memory=read_memory(),
        gpus=read_gpus(),
        device=str(device),
        kernels={str(dtype).removeprefix("torch."): kernels(dtype) for dtype in dtypes},
        passed_over=() if native.library is None else native.library.passed_over,
        num_threads=num_threads,
        held_cpus=held_elsewhere(allowed_cpus()),
        read_bytes_per_s=None if native.library is None else _read_bandwidth(num_threads),
        models=_models(),
    )


def _read_bandwidth(num_threads: int) -> float:
    with shown_progress() as progress, stage(progress, "Measuring memory"):
        return measure_reading(num_threads)


def _models() -> dict[str, str]:
    from triode.models.progress import NullProgress
    from triode.models.source import ALIASES, locate

    found: dict[str, str] = {}
    for alias in ALIASES:
        try:
            found[alias] = str(locate(alias, NullProgress()))
        except ModelNotFound as error:
            found[alias] = str(error)
    return found


def _lines(report: Report) -> list[str]:
    processor, memory, reading = report.processor, report.memory, report.read_bytes_per_s
    quota = "" if processor.quota_cores is None else f", limited to {processor.quota_cores:g} cores' time"
    held = f"; running engines hold CPU {', '.join(map(str, report.held_cpus))}" if report.held_cpus else ""
    gpus = [
        f"{gpu.name} (compute capability {gpu.compute_capability}), {_gib(gpu.free_bytes)} of {_gib(gpu.total_bytes)} free"
        for gpu in report.gpus
    ]
    rows = [
        ("versions", ", ".join(f"{name} {version}" for name, version in report.versions.items())),
        ("CPU", f"{processor.name}, {processor.num_allowed_cores} of {processor.num_cores} cores allowed{quota}"),
        ("CPU features", " ".join(processor.features) or "none that matter"),
        ("threads", f"{report.num_threads} for one operation{held}"),
        ("memory", f"{_gib(memory.available_bytes)} available of {_gib(memory.total_bytes)}"),
        (
            "memory reads",
            "not measured" if reading is None else f"{reading / 1e9:.1f} GB/s by {report.num_threads} threads",
        ),
        ("GPU", "; ".join(gpus) or "none that torch can use"),
        ("device", report.device),
        *((f"kernels, {dtype}", names) for dtype, names in report.kernels.items()),
        *(("not used", reason) for reason in report.passed_over),
        *((f"model {alias}", where) for alias, where in report.models.items()),
    ]
    width = max(len(label) for label, _ in rows)
    return [f"{label:<{width}}  {value}" for label, value in rows]


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f} GiB"
