"""One rank's share of a checkpoint (`parallel.py`)."""

import re
from collections.abc import Mapping
from dataclasses import replace

import torch

from triode.models.config import ModelConfig
from triode.models.parallel import outputs_of
from triode.models.quantization import BLOCK
from triode.models.stored import BlockReader
from triode.models.tensors import TensorReader, check_tensors
from triode.models.weights import HEAD, DecoderWeights

# What leads to heads or inner features is cut by its outputs, what leads back by its inputs.
_ROWS = re.compile(r".*\.(self_attn\.[qkv]_proj|mlp\.(gate|up)_proj)\.(weight|bias)")
_COLUMNS = re.compile(r".*\.(self_attn\.o_proj|mlp\.down_proj)\.weight")


class SharedTensors:
    """A `TensorReader` that reads, of each tensor of another one, this rank's share. One tensor at a time is held whole."""

    def __init__(self, config: ModelConfig, reader: TensorReader, rank: int, num_ranks: int) -> None:
        """Checks the whole checkpoint first.

        Args:
            config: the whole model's.
            reader: what reads its tensors.
            rank: whose share it is.
            num_ranks: how many there are.

        Raises:
            CorruptModel: a tensor is missing, or has another shape than the config says.
            UnsupportedModel: there is a tensor that this kind of model does not have.
        """
        check_tensors(config, reader)
        self._reader = reader
        self._rank, self._num_ranks = rank, num_ranks

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Those of the shares."""
        return {name: self._share(name, shape) for name, shape in self._reader.shapes.items()}

    def label(self, name: str) -> str:
        """The whole tensor's."""
        return self._reader.label(name)

    def read_into(self, name: str, destination: torch.Tensor) -> None:
        """Writes the share."""
        if (axis := _axis(name)) is None:
            self._reader.read_into(name, destination)
            return
        whole = torch.empty(self._reader.shapes[name], dtype=destination.dtype, device=destination.device)
        self._reader.read_into(name, whole)
        destination.copy_(whole.chunk(self._num_ranks, axis)[self._rank])

    def _share(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        axis = _axis(name)
        return tuple(size // self._num_ranks if index == axis else size for index, size in enumerate(shape))


class SharedBlocks(SharedTensors):
    """The same of a file whose matrices are blocks: a `BlockReader`."""

    def __init__(
        self, config: ModelConfig, reader: TensorReader, blocks: BlockReader, rank: int, num_ranks: int
    ) -> None:
        super().__init__(config, reader, rank, num_ranks)
        self._blocks = blocks

    def format(self, name: str) -> str:
        """That of the whole tensor."""
        return self._blocks.format(name)

    def blocks(self, name: str) -> torch.Tensor:
        """Bytes of the share, [rows, bytes a row].

        Raises:
            ValueError: the share would end within a block.
        """
        whole, axis = self._blocks.blocks(name), _axis(name)
        inputs = self.shapes[name][-1]
        if axis == 1 and inputs % BLOCK:
            raise ValueError(
                f"tensor_parallel must leave each process a multiple of {BLOCK} inputs of {name}, whose blocks it keeps, "
                f"got {self._num_ranks}, which leaves {inputs}"
            )
        return whole if axis is None else whole.chunk(self._num_ranks, axis)[self._rank].contiguous()


def shared(config: ModelConfig, reader: TensorReader, rank: int, num_ranks: int) -> SharedTensors:
    """The reader of a rank's share.

    Raises:
        CorruptModel, UnsupportedModel: as for the whole checkpoint.
    """
    if isinstance(reader, BlockReader):
        return SharedBlocks(config, reader, reader, rank, num_ranks)
    return SharedTensors(config, reader, rank, num_ranks)


def _axis(name: str) -> int | None:
    """Along which a tensor is cut."""
    if _ROWS.fullmatch(name):
        return 0
    return 1 if _COLUMNS.fullmatch(name) else None


def with_share_of_head(config: ModelConfig, weights: DecoderWeights, rank: int, num_ranks: int) -> DecoderWeights:
    """The weights with those outputs of the head that this rank computes."""
    outputs = outputs_of(config.vocab_size, rank, num_ranks)
    stored = dict(weights.stored)
    if (whole := stored.get(HEAD)) is not None:
        stored[HEAD] = replace(whole, read=lambda: whole.read()[outputs.start : outputs.stop])
    return replace(weights, head_VD=weights.head_VD[outputs.start : outputs.stop], stored=stored)
