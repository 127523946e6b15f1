"""The formats of packed matrices, as `grouped.h` numbers them."""

from dataclasses import dataclass

PLAIN, CHANNEL8, GROUP8, GROUP4, GGUF_Q8_0, GGUF_Q4_0, GGUF_Q4_1 = range(7)
GROUPS = (32, 64, 128)
"""Sizes that groups may have; those of GGUF formats are of 32."""
WHOLE_ROW = 0
"""Stands for one group of all inputs."""


@dataclass(frozen=True, slots=True)
class Packing:
    """How one matrix is kept, and what it is multiplied with."""

    format: int
    group: int = 0
    """Inputs that share a scale; `WHOLE_ROW` for all, and where a format has no groups."""
    byte_inputs: bool = False
    """Whether inputs are rounded to 8 bits, group by group."""
