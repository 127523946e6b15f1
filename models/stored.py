"""Which matrices of a checkpoint keep the quantised blocks of its file, and how these are read."""

from collections.abc import Iterator
from functools import partial
from typing import Protocol, runtime_checkable

import torch

from triode.models.config import ModelConfig
from triode.models.quantization import GGUF_FORMATS, WeightPlan
from triode.models.weights import EMBEDDING, HEAD, MATRIX_PARTS, StoredMatrix

EMBEDDINGS = "model.embed_tokens.weight"
"""A checkpoint's name of what it looks tokens up in."""
_PLAIN = ("F32", "F16", "BF16", "F64")


@runtime_checkable
class BlockReader(Protocol):
    """A `TensorReader` of a file whose matrices are blocks."""

    def format(self, name: str) -> str:
        """How the file keeps a tensor, as GGUF spells it."""

    def blocks(self, name: str) -> torch.Tensor:
        """Its bytes, [rows, bytes a row]."""


def stored_matrices(config: ModelConfig, reader: object, plan: WeightPlan) -> dict[str, StoredMatrix]:
    """The matrices whose blocks `plan` keeps. Those that the file holds as floats are not among them.

    Raises:
        ValueError: the file has no blocks, or a matrix is in blocks that cannot be kept.
    """
    plan.check(config.num_layers)
    found: dict[str, StoredMatrix] = {}
    for name, parts in _matrices(config):
        if not plan.keeps_blocks(name):
            continue
        if not isinstance(reader, BlockReader):
            raise ValueError(f"quantization must not be that of a GGUF file where there is none, got '{plan}'")
        formats = sorted({reader.format(part) for part in parts})
        if not set(formats) <= set(_PLAIN):
            found[name] = StoredMatrix(_the_one(name, formats), parts, partial(_joined, reader, parts))
    return found


def _matrices(config: ModelConfig) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Each matrix, and the checkpoint's tensors whose rows it joins."""
    for index in range(config.num_layers):
        for matrix, modules in MATRIX_PARTS.items():
            yield f"layers.{index}.{matrix}", tuple(f"model.layers.{index}.{module}.weight" for module in modules)
    yield HEAD, (EMBEDDINGS if config.tie_word_embeddings else "lm_head.weight",)
    yield EMBEDDING, (EMBEDDINGS,)


def _the_one(name: str, formats: list[str]) -> str:
    if len(formats) == 1 and formats[0] in GGUF_FORMATS:
        return formats[0]
    raise ValueError(
        f"{name} is stored as {' and '.join(formats)}, whose blocks cannot be kept (only those of one of "
        f"{', '.join(GGUF_FORMATS)} can): choose another format for it in quantization_overrides, such as a8w8"
    )


def _joined(reader: BlockReader, parts: tuple[str, ...]) -> torch.Tensor:
    return torch.cat([reader.blocks(part) for part in parts])
