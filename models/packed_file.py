"""A file of packed weights: a second start reads it, instead of reading, rounding and packing a checkpoint.

The file is in safetensors' format, one tensor for all packed matrices and one for each of the small arrays, in the order in
which they are packed. What it was made of is its key; a file with another key, or a damaged one, is made anew. It is read into
memory of huge pages rather than mapped: a step reads all of it, and small pages cost a fifth of the bandwidth.

safetensors is imported where a file is read or written: a start that does neither goes without.
"""

import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from triode.kernels.native.formats import Packing
from triode.models.parallel import RankOrder
from triode.models.room import check_room

_CPU = torch.device("cpu")
_MATRICES = "matrices"


@dataclass(frozen=True, slots=True)
class PackedArrays:
    """What a file holds, as it is read."""

    matrices: torch.Tensor
    """The bytes of all packed matrices."""
    arrays: Iterator[torch.Tensor]
    """The others, in the order in which they were packed."""
    packings: Mapping[str, Packing]
    """Of every matrix, by its name."""


@dataclass(frozen=True, slots=True)
class PackedFile:
    """Where packed weights are kept, and what they must have been made of."""

    path: Path
    key: str

    def read(self, ranks: RankOrder | None = None) -> PackedArrays | str:
        """The packed weights, or why they cannot be taken from the file.

        Args:
            ranks: those that read as much from files of their own at the same time.

        Raises:
            InsufficientMemory: they are those that are wanted, and do not fit.
        """
        from safetensors import SafetensorError, safe_open

        if not self.path.exists():
            return f"there is no {self.path}"
        try:
            with safe_open(self.path, "pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("key") != self.key:
                    return f"{self.path} was made of another model, in another format or for another machine"
                num_bytes = self.path.stat().st_size
                check_room(f"the packed weights in {self.path}", num_bytes, _CPU, ranks, "quantization")
                names = sorted(name for name in file.keys() if name != _MATRICES)  # noqa: SIM118
                matrices, arrays = file.get_tensor(_MATRICES), [file.get_tensor(name) for name in names]
        except (SafetensorError, OSError) as error:
            return f"{self.path} is damaged: {error}"
        if metadata["sums"] != _sums(matrices, arrays):
            return f"{self.path} is damaged: its sums are not those that were written"
        packings = {name: Packing(**packing) for name, packing in json.loads(metadata["packings"]).items()}
        return PackedArrays(matrices, iter(arrays), packings)

    def write(self, matrices: torch.Tensor, arrays: Sequence[torch.Tensor], packings: Mapping[str, Packing]) -> None:
        """Write the file whole or not at all.

        Raises:
            OSError: the folder cannot be written to, or is full.
        """
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        tensors = {f"{index:08}": array for index, array in enumerate(arrays)}
        metadata = {
            "key": self.key,
            "sums": _sums(matrices, arrays),
            "packings": json.dumps({name: asdict(packing) for name, packing in packings.items()}),
        }
        handle, unfinished = tempfile.mkstemp(dir=self.path.parent, prefix=self.path.name, suffix=".tmp")
        os.close(handle)
        try:
            save_file({_MATRICES: matrices, **tensors}, unfinished, metadata)
            Path(unfinished).replace(self.path)
        except SafetensorError as error:
            raise OSError(f"{self.path} cannot be written: {error}") from error
        finally:
            Path(unfinished).unlink(missing_ok=True)


def _sums(matrices: torch.Tensor, arrays: Sequence[torch.Tensor]) -> str:
    """Sums of all words, modulo 2^64, as fast as memory is read."""
    words = [tensor.contiguous().flatten().view(torch.uint8) for tensor in (matrices, *arrays)]
    return " ".join(str(int(word[: len(word) // 4 * 4].view(torch.int32).sum())) for word in words)
