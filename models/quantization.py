"""How the compiled CPU step keeps each matrix of a model: the formats there are, and which matrix gets which.

`aXwY` means activations of X bits times weights of Y bits. 8-bit activations are rounded anew for each token, with a scale
for each group of the inputs; 16-bit ones are what the step computes in, bfloat16 or float32. `aXgguf` keeps the blocks of
a GGUF file: 32 weights of 4 or 8 bits, their scale in half precision.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from triode.kernels.native.formats import (
    CHANNEL8,
    GGUF_Q4_0,
    GGUF_Q4_1,
    GGUF_Q8_0,
    GROUP4,
    GROUP8,
    GROUPS,
    PLAIN,
    WHOLE_ROW,
    Packing,
)

Quantization = Literal["none", "a16w8", "a8w8", "a16w4", "a8w4", "a16gguf", "a8gguf"]

GGUF_FORMATS = {"Q4_0": GGUF_Q4_0, "Q4_1": GGUF_Q4_1, "Q8_0": GGUF_Q8_0}
"""The blocks that can be kept."""
BLOCK = 32
"""Weights of such a block."""
_KEEPS_BLOCKS = {"a16gguf": False, "a8gguf": True}
_HEAD_FORMATS: dict[Quantization, Quantization] = {"a16w4": "a16w8", "a8w4": "a8w8"}
_OF_4_BITS = {"a16w4", "a8w4"}
_MATRICES = ("qkv", "o", "gate_up", "down")
_HEAD = "head"
_EMBEDDING = "embedding"


@dataclass(frozen=True, slots=True)
class _Grouped:
    format: int
    default_group: int
    byte_inputs: bool


_GROUPED = {
    "a8w8": _Grouped(GROUP8, 64, True),
    "a16w4": _Grouped(GROUP4, 32, False),
    "a8w4": _Grouped(GROUP4, 32, True),
}


def _packing(quantization: Quantization, group: int | None, stored: str | None) -> Packing:
    if quantization in _KEEPS_BLOCKS and stored is not None:
        return Packing(GGUF_FORMATS[stored], BLOCK, _KEEPS_BLOCKS[quantization])
    if quantization == "a16w8":
        return Packing(GROUP8, group) if group else Packing(CHANNEL8)
    if (kind := _GROUPED.get(quantization)) is None:
        return Packing(PLAIN)
    return Packing(kind.format, kind.default_group if group is None else group, kind.byte_inputs)


@dataclass(frozen=True, slots=True)
class WeightPlan:
    """Which matrix is kept in which format.

    Matrices are named `layers.I.qkv`, `layers.I.o`, `layers.I.gate_up`, `layers.I.down`, `head` and `embedding`: what is
    multiplied by the same input is one matrix. The head has 8 bits where the others have 4, unless an override says
    otherwise: it alone would cost more accuracy than all of them. The embedding, of which a token reads one row, stays as it
    is unless an override says otherwise; a tied one that has the head's format is not kept twice.
    """

    quantization: Quantization = "none"
    group: int | None = None
    """Inputs that share a scale, 0 for all of an output's; None takes each format's own."""
    overrides: tuple[tuple[re.Pattern[str], Quantization], ...] = ()
    """The first pattern that matches a matrix's whole name gives its format."""

    def packing(self, name: str, stored: str | None = None) -> Packing:
        """The format of a matrix, which its file may hold in the blocks `stored`."""
        return _packing(self._choice(name), self.group, stored)

    def keeps_blocks(self, name: str) -> bool:
        """Whether a matrix stays as its file has it."""
        return self._choice(name) in _KEEPS_BLOCKS

    def _choice(self, name: str) -> Quantization:
        return next((choice for pattern, choice in self.overrides if pattern.fullmatch(name)), self._default(name))

    def _default(self, name: str) -> Quantization:
        if name == _EMBEDDING:
            return "none"
        return _HEAD_FORMATS.get(self.quantization, self.quantization) if name == _HEAD else self.quantization

    @property
    def _choices(self) -> set[Quantization]:
        return {self.quantization, *(choice for _, choice in self.overrides)}

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
                    f"({', '.join(_MATRICES)}), head or embedding, got {pattern.pattern!r}, which matches none"
                )

    def check_group(self, group: int) -> None:
        """Check a chosen size of groups.

        Raises:
            ValueError: there is no such size, or nothing that could have it.
        """
        if group not in (WHOLE_ROW, *GROUPS):
            sizes = ", ".join(map(str, GROUPS))
            raise ValueError(f"quantization_group must be one of {sizes}, or 0 for whole rows, got {group!r}")
        if group == WHOLE_ROW and self._choices & _OF_4_BITS:
            raise ValueError(f"quantization_group must be one of {', '.join(map(str, GROUPS))} for 4 bits, got 0")
        if not self._choices & {"a16w8", *_GROUPED}:
            raise ValueError(f"quantization_group must be None with quantization={self.quantization!r}, got {group}")

    @property
    def is_plain(self) -> bool:
        """Whether it quantises nothing."""
        return self._choices == {"none"}

    def __str__(self) -> str:
        groups = {None: "", WHOLE_ROW: " per channel"}.get(self.group, f" g{self.group}")
        name = self.quantization + groups
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
    if group is not None:
        plan.check_group(group)
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
    return [*(f"layers.{index}.{matrix}" for index in range(num_layers) for matrix in _MATRICES), _HEAD, _EMBEDDING]
