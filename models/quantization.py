"""How the compiled CPU step keeps each matrix of a model: the formats there are, and which matrix gets which.

`aXwY` means activations of X bits times weights of Y bits. 8-bit activations are rounded anew for each token, with a scale
for each group of the inputs; 16-bit ones are what the step computes in, bfloat16 or float32.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from triode.kernels.native.formats import CHANNEL8, GROUP4, GROUP8, GROUPS, PLAIN, Packing

Quantization = Literal["none", "a16w8", "a8w8", "a16w4", "a8w4"]

HEAD = "head"
_MATRICES = ("qkv", "o", "gate_up", "down")


@dataclass(frozen=True, slots=True)
class _Kind:
    packing: int
    byte_inputs: bool
    default_group: int


_KINDS: dict[str, _Kind] = {
    "a8w8": _Kind(GROUP8, True, 64),
    "a16w4": _Kind(GROUP4, False, 32),
    "a8w4": _Kind(GROUP4, True, 32),
}


def packing_of(quantization: Quantization, group: int | None) -> Packing:
    """The format by its name and, where it has groups, their size; None takes the format's own.

    Raises:
        ValueError: the format has no groups of that size.
    """
    if quantization == "none":
        return Packing(PLAIN)
    if group is not None and group not in GROUPS:
        raise ValueError(f"quantization_group must be one of {', '.join(map(str, GROUPS))}, got {group!r}")
    if quantization == "a16w8":
        return Packing(CHANNEL8) if group is None else Packing(GROUP8, group)
    kind = _KINDS[quantization]
    return Packing(kind.packing, group or kind.default_group, kind.byte_inputs)


@dataclass(frozen=True, slots=True)
class WeightPlan:
    """Which matrix is kept in which format.

    Matrices are named `layers.I.qkv`, `layers.I.o`, `layers.I.gate_up`, `layers.I.down` and `head`: what is multiplied by
    the same input is one matrix.
    """

    quantization: Quantization = "none"
    group: int | None = None
    """Inputs that share a scale; None takes each format's own."""
    overrides: tuple[tuple[re.Pattern[str], Quantization], ...] = ()
    """The first pattern that matches a matrix's whole name gives its format."""

    def packing(self, name: str) -> Packing:
        """The format of a matrix."""
        found = (quantization for pattern, quantization in self.overrides if pattern.fullmatch(name))
        return packing_of(next(found, self.quantization), self.group)

    def check(self, num_layers: int) -> None:
        """Check it against a model.

        Raises:
            ValueError: a pattern matches no matrix.
        """
        names = matrix_names(num_layers)
        for pattern, _ in self.overrides:
            if not any(map(pattern.fullmatch, names)):
                raise ValueError(
                    f"quantization_overrides must match layers.0.qkv to layers.{num_layers - 1}.down "
                    f"({', '.join(_MATRICES)}) or head, got {pattern.pattern!r}, which matches none"
                )

    @property
    def is_plain(self) -> bool:
        """Whether it quantises nothing."""
        return {self.quantization, *(quantization for _, quantization in self.overrides)} == {"none"}

    def __str__(self) -> str:
        name = self.quantization if self.group is None else f"{self.quantization} g{self.group}"
        return f"{name}, {len(self.overrides)} overrides" if self.overrides else name


NOT_QUANTIZED = WeightPlan()


def plan_weights(
    quantization: Quantization, group: int | None = None, overrides: Mapping[str, str] | None = None
) -> WeightPlan:
    """The plan that a caller's options spell.

    Raises:
        ValueError: an option is not what it must be.
    """
    plan = WeightPlan(quantization, group, tuple(_parsed(overrides or {})))
    for chosen in (quantization, *(chosen for _, chosen in plan.overrides)):
        packing_of(chosen, group)
    if group is not None and plan.is_plain:
        raise ValueError(f"quantization_group must be None where nothing is quantised, got {group}")
    return plan


def _parsed(overrides: Mapping[str, str]) -> Iterable[tuple[re.Pattern[str], Quantization]]:
    choices: dict[str, Quantization] = {choice: choice for choice in get_args(Quantization)}
    for text, name in overrides.items():
        if name not in choices:
            raise ValueError(f"quantization_overrides[{text!r}] must be one of {', '.join(choices)}, got {name!r}")
        try:
            yield re.compile(text), choices[name]
        except re.error as error:
            raise ValueError(f"quantization_overrides must hold regular expressions, got {text!r}: {error}") from error


def matrix_names(num_layers: int) -> list[str]:
    """Of a whole model, as plans spell them."""
    return [*(f"layers.{index}.{matrix}" for index in range(num_layers) for matrix in _MATRICES), HEAD]
