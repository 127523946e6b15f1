"""Which program computes the steps of a model on the CPU: compiled code where it can be had, torch operations elsewhere."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from triode.kernels.dispatch import choose_kernels
from triode.kernels.native.build import NativeUnavailable
from triode.kernels.native.library import NativeLibrary, load_library
from triode.models.config import KernelChoice, ModelConfig
from triode.models.decoder import Decoder
from triode.models.native import DTYPES, NativeDecoder, native_names
from triode.models.progress import Progress
from triode.models.quantization import WeightPlan
from triode.models.weights import DecoderWeights, LayerWeights

CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class NativeChoice:
    """The compiled step, or why there is none."""

    library: NativeLibrary | None
    missing: str | None = None
    """The reason why torch operations take its place, unless they were asked for."""


def choose_native(dtype: torch.dtype, choice: KernelChoice, plan: WeightPlan, progress: Progress) -> NativeChoice:
    """Load the compiled step, and compile it if need be.

    Raises:
        ValueError: `choice` or `plan` asks for it, and it cannot be had.
    """
    if choice == "reference":
        if not plan.is_plain:
            raise ValueError(f"quantization must be none with kernels='reference', got '{plan}'")
        return NativeChoice(None)
    try:
        _check_dtype(dtype)
        return NativeChoice(_load(progress))
    except NativeUnavailable as reason:
        if choice == "native":
            raise ValueError(f"kernels must be auto or reference here, got 'native': {reason}") from reason
        if not plan.is_plain:
            raise ValueError(f"quantization must be none here, got '{plan}': {reason}") from reason
        return NativeChoice(None, str(reason))


def _load(progress: Progress) -> NativeLibrary:
    announced: list[str] = []

    def announce(text: str) -> None:
        announced.append(text)
        progress.stage(text, None, "")

    library = load_library(announce)
    if announced:
        progress.done()
    return library


def cpu_program(
    config: ModelConfig,
    weights: DecoderWeights,
    layers: Iterable[LayerWeights],
    library: NativeLibrary | None,
    plan: WeightPlan,
) -> NativeDecoder | Decoder:
    """The program over `layers`, which are taken one at a time. Only the compiled step quantises."""
    if library is not None:
        return NativeDecoder(config, weights, library, layers, plan)
    return Decoder(config, weights, choose_kernels(CPU, weights.embed_VD.dtype), layers)


def find_native(progress: Progress) -> NativeChoice:
    """The compiled step, if it can be had here."""
    try:
        return NativeChoice(_load(progress))
    except NativeUnavailable as reason:
        return NativeChoice(None, str(reason))


def describe_auto_kernels(dtype: torch.dtype, native: NativeChoice) -> str:
    """What "auto" takes here."""
    missing = native.missing
    if native.library is not None:
        try:
            _check_dtype(dtype)
            return describe_kernels(native_names(native.library.isa), None)
        except NativeUnavailable as reason:
            missing = str(reason)
    return describe_kernels(choose_kernels(CPU, dtype).names, missing)


def describe_kernels(names: Mapping[str, str], missing: str | None) -> str:
    """Each implementation in use with its operations, and why the compiled step is not among them."""
    operations: dict[str, list[str]] = defaultdict(list)
    for operation, implementation in names.items():
        operations[implementation].append(operation)
    found = [f"{implementation}: {', '.join(users)}" for implementation, users in operations.items()]
    return "; ".join(found if missing is None else [*found, f"no native step: {missing}"])


def _check_dtype(dtype: torch.dtype) -> None:
    if dtype not in DTYPES:
        raise NativeUnavailable(f"native kernels compute in float32 and bfloat16, not in {_name(dtype)}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
