"""From a checkpoint's tensors to the weights: every tensor is checked first, then read straight into its place.

A `TensorReader` is one checkpoint format. It speaks the names of Hugging Face's checkpoints, whatever its own are, and
reads one tensor at a time in pieces, so that loading never holds a second copy of the model.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Protocol

import torch

from triode.errors import CorruptModel, UnsupportedModel
from triode.models.config import ModelConfig
from triode.models.parallel import RankOrder
from triode.models.progress import Progress
from triode.models.quantization import NOT_QUANTIZED, WeightPlan
from triode.models.room import check_room
from triode.models.stored import EMBEDDINGS, stored_matrices
from triode.models.weights import EMBEDDING, HEAD, DecoderWeights, allocate, places

# What some checkpoints carry besides their weights: tables that are computed from the config.
_BUFFERS = re.compile(
    r"(model\.layers\.\d+\.self_attn\.rotary_emb|model\.rotary_emb)\.(inv_freq|cos_cached|sin_cached)"
)
_HEAD = "lm_head.weight"


class TensorReader(Protocol):
    """The tensors of one checkpoint, by their Hugging Face names."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Every tensor there is; one that has no Hugging Face name keeps its own."""

    def label(self, name: str) -> str:
        """The file and the tensor's own name in it, for messages."""

    def read_into(self, name: str, destination: torch.Tensor) -> None:
        """Writes the tensor into a view of its shape, converting to the view's dtype."""


def load_weights(
    config: ModelConfig,
    reader: TensorReader,
    dtype: torch.dtype,
    device: torch.device,
    progress: Progress,
    plan: WeightPlan = NOT_QUANTIZED,
    ranks: RankOrder | None = None,
) -> DecoderWeights:
    """Reads a checkpoint into newly allocated weights, but for matrices whose blocks `plan` keeps.

    Args:
        config: the model's, or one rank's share of it.
        reader: what reads its tensors.
        dtype: of the weights.
        device: where they are to be.
        progress: told how far it has come.
        plan: which matrices stay as they are.
        ranks: those that read their shares at the same time.

    Raises:
        CorruptModel: a tensor is missing, or has another shape than the config says.
        UnsupportedModel: there is a tensor that this kind of model does not have.
        InsufficientMemory: the weights do not fit.
        ValueError: `plan` does not suit the checkpoint.
    """
    check_tensors(config, reader)
    stored = stored_matrices(config, reader, plan)
    # A tied tensor is read if either of its uses wants numbers.
    unread = set(stored) if not config.tie_word_embeddings or HEAD in stored else set(stored) - {EMBEDDING}
    kept = {part for name in unread for part in stored[name].parts}
    if EMBEDDING not in unread:
        kept.discard(EMBEDDINGS)
    sizes = places(config, allocate(config, dtype, "meta"))
    num_bytes = sum(view.nbytes for name, view in sizes if name not in kept)
    check_room(f"the weights in {dtype}", num_bytes, device, ranks, "dtype")
    weights = replace(allocate(config, dtype, device, unread), stored=stored)
    progress.stage("Loading weights", num_bytes, "B")
    for name, view in places(config, weights):
        if name in kept:
            continue
        reader.read_into(name, view)
        _check_range(reader, name, view)
        progress.advance(view.nbytes)
    if config.tie_word_embeddings and _HEAD in reader.shapes:
        _check_tied_head(reader, weights)
    progress.done()
    return weights


def check_tensors(config: ModelConfig, reader: TensorReader) -> None:
    """Compares names and shapes with what the config calls for, before anything is allocated."""
    expected = {name: tuple(view.shape) for name, view in places(config, allocate(config, torch.float32, "meta"))}
    shapes = reader.shapes
    if config.tie_word_embeddings and _HEAD in shapes:
        expected[_HEAD] = expected[EMBEDDINGS]
    for name, shape in expected.items():
        if (found := shapes.get(name)) is None:
            raise CorruptModel(f"{reader.label(name)} is missing")
        if found != shape:
            raise CorruptModel(f"{reader.label(name)} must have the shape {list(shape)}, got {list(found)}")
    for name in shapes:
        if name not in expected and not _BUFFERS.fullmatch(name):
            raise UnsupportedModel(
                f"{reader.label(name)} is unexpected: this {config.architecture} model has no such tensor"
            )


def _check_tied_head(reader: TensorReader, weights: DecoderWeights) -> None:
    """A tied model may store its head again, but only if it is the same."""
    head_VD = torch.empty_like(weights.embed_VD)
    reader.read_into(_HEAD, head_VD)
    if not torch.equal(head_VD, weights.embed_VD):
        raise UnsupportedModel(f"{reader.label(_HEAD)} differs from the embeddings, to which the config ties it")


def _check_range(reader: TensorReader, name: str, view: torch.Tensor) -> None:
    """Float16 is the one dtype whose range is narrower than what checkpoints hold."""
    if view.dtype == torch.float16 and not torch.isfinite(view).all():
        raise UnsupportedModel(
            f"{reader.label(name)} has values beyond float16's range; load it as bfloat16 or float32"
        )
