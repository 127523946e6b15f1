"""The tensors of a Hugging Face folder: one `.safetensors` file, or shards and their index.

The files are memory-mapped and a tensor is a view of its mapping, so that reading one copies it once, into its place.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol, cast

import torch
from safetensors import SafetensorError, safe_open

from triode.errors import CorruptModel, ModelNotFound, UnsupportedModel
from triode.models.hf_config import read_json

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_DTYPES = ("F64", "F32", "F16", "BF16")


class _Slice(Protocol):
    def get_shape(self) -> list[int]: ...
    def get_dtype(self) -> str: ...


class _File(Protocol):
    def keys(self) -> list[str]: ...
    def get_slice(self, name: str) -> _Slice: ...
    def get_tensor(self, name: str) -> torch.Tensor: ...


class SafetensorsFolder:
    """A `TensorReader` of one folder.

    Raises:
        ModelNotFound: the folder has no safetensors.
        CorruptModel: a file is truncated, unreadable or missing, or lacks a tensor of the index.
        UnsupportedModel: a tensor's dtype is not a floating-point one of at least 16 bits.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, Path] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._open: dict[Path, _File] = {}
        placed = _placement(folder)
        for path in dict.fromkeys(placed.values()) or [folder / _SINGLE]:
            self._add(path)
        for name, path in placed.items():
            if self._files.get(name) != path:
                raise CorruptModel(f"{path}: tensor {name} is missing, which {_INDEX} says is there")

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Every tensor of every file."""
        return self._shapes

    def label(self, name: str) -> str:
        """File and tensor; the folder where no file has it."""
        return f"{self._files.get(name, self._folder)}: tensor {name}"

    def read_into(self, name: str, destination: torch.Tensor) -> None:
        """Copies the tensor out of its mapping."""
        destination.copy_(self._open[self._files[name]].get_tensor(name))

    def _add(self, path: Path) -> None:
        if not path.is_file():
            raise CorruptModel(f"{path} is missing, which {_INDEX} names")
        try:
            file = self._open[path] = cast("_File", safe_open(path, framework="pt"))
        except SafetensorError as error:
            raise CorruptModel(f"{path} is truncated or not a safetensors file: {error}") from error
        for name in file.keys():  # noqa: SIM118 - it is not a mapping
            if name in self._files:
                raise CorruptModel(f"{path}: tensor {name} is in {self._files[name].name} too")
            tensor = file.get_slice(name)
            if (dtype := tensor.get_dtype()) not in _DTYPES:
                raise UnsupportedModel(f"{path}: tensor {name} has the unsupported dtype {dtype}")
            self._files[name] = path
            self._shapes[name] = tuple(tensor.get_shape())


def _placement(folder: Path) -> dict[str, Path]:
    """The file of each tensor as the index gives it; empty for a single file."""
    index = folder / _INDEX
    if not index.is_file():
        if not (folder / _SINGLE).is_file():
            raise ModelNotFound(f"{folder} has neither {_SINGLE} nor {_INDEX}: only safetensors are loaded")
        return {}
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CorruptModel(f"{index}: weight_map must name the file of each tensor, got {weight_map!r:.80}")
    return {name: _shard(index, file_name) for name, file_name in weight_map.items()}


def _shard(index: Path, name: object) -> Path:
    # A name with a folder in it would reach outside the model's own.
    if not isinstance(name, str) or not name or Path(name).name != name:
        raise CorruptModel(f"{index}: weight_map must hold file names, got {name!r}")
    return index.with_name(name)
