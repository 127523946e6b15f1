"""The weights of a model as the compiled step reads them: packed matrices, padded vectors, and the table of addresses."""

import ctypes
from collections.abc import Iterable

import torch

from triode.kernels.native.formats import CHANNEL8, PLAIN, Packing
from triode.kernels.native.library import LayerStruct, MatrixStruct, ModelStruct, NativeLibrary, RanksStruct
from triode.models.config import ModelConfig
from triode.models.quantization import WeightPlan
from triode.models.rope import rope_table
from triode.models.weights import EMBEDDING, HEAD, DecoderWeights, LayerWeights

PANEL = 64
ALIGNMENT_BYTES = 64
_HALF_PANEL = 16


def rounded_up(number: int, multiple: int) -> int:
    """The least multiple that is not smaller."""
    return -(-number // multiple) * multiple


class PackedModel:
    """The packed matrices in one allocation, the small tensors as floats, and the table of addresses."""

    def __init__(
        self,
        library: NativeLibrary,
        config: ModelConfig,
        weights: DecoderWeights,
        layers: Iterable[LayerWeights],
        plan: WeightPlan,
        ranks: RanksStruct | None = None,
    ) -> None:
        plan.check(config.num_layers)
        self._saved = weights.packed
        self._library = library
        self._plan = plan
        self._stored = weights.stored
        self._number_bytes = weights.embed_VD.dtype.itemsize
        self._kept: list[torch.Tensor] = []
        self._packings: dict[str, Packing] = {}
        self.num_outputs = len(weights.head_VD)
        self.matrices_bytes = self._num_bytes(config)
        self._matrices = self._allocate(self.matrices_bytes)
        self._next = self._matrices.data_ptr()
        self.layers = (LayerStruct * config.num_layers)(
            *(self._layer(index, layer, config.window_tokens(index)) for index, layer in enumerate(layers))
        )
        self.model = self._model(config, weights, ranks)
        self._saved = None
        if weights.pack_to is not None:
            weights.pack_to.write(self._matrices, self._kept, self._packings)

    @property
    def num_bytes(self) -> int:
        """Of everything that is kept, the embedding and the tables of rotations included."""
        return self.matrices_bytes + sum(tensor.nbytes for tensor in self._kept)

    def _allocate(self, num_bytes: int) -> torch.Tensor:
        """Memory for the matrices, in huge pages where the system grants them, with what was saved of them."""
        memory = torch.empty(num_bytes + ALIGNMENT_BYTES, dtype=torch.uint8)
        start = -memory.data_ptr() % ALIGNMENT_BYTES
        self._library.prefer_huge_pages(memory.data_ptr() + start, num_bytes)
        matrices = memory[start : start + num_bytes]
        # What pads a matrix to whole cache lines is written to files.
        return matrices.zero_() if self._saved is None else matrices.copy_(self._saved.matrices)

    def _model(self, config: ModelConfig, weights: DecoderWeights, ranks: RanksStruct | None) -> ModelStruct:
        rope = rope_table(config, torch.device("cpu"))
        head = self._matrix(HEAD, weights.head_VD, None)
        return ModelStruct(
            is_bf16=weights.embed_VD.dtype == torch.bfloat16,
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_layers=config.num_layers,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            num_positions=len(rope.cos_XU),
            norm_eps=config.rms_norm_eps,
            embedding=self._embedding(weights, head),
            final_norm=self._floats(weights.final_norm_D),
            cos=self._keep(rope.cos_XU),
            sin=self._keep(rope.sin_XU),
            layers=self.layers,
            head=head,
            num_outputs=self.num_outputs,
            ranks=None if ranks is None else ctypes.pointer(ranks),
        )

    def _num_bytes(self, config: ModelConfig) -> int:
        """Of all packed matrices."""
        D, F = config.hidden_size, config.intermediate_size
        shapes = {
            "qkv": (config.q_size + 2 * config.kv_size, D, False),
            "o": (D, config.q_size, False),
            "gate_up": (2 * F, D, True),
            "down": (D, F, False),
        }
        layers = (
            self._packed_bytes(f"layers.{index}.{matrix}", rows, columns, halves=halves)
            for index in range(config.num_layers)
            for matrix, (rows, columns, halves) in shapes.items()
        )
        return sum(layers) + self._packed_bytes(HEAD, self.num_outputs, D)

    def _layer(self, index: int, layer: LayerWeights, window_tokens: int | None) -> LayerStruct:
        prefix = f"layers.{index}"
        return LayerStruct(
            input_norm=self._floats(layer.input_norm_D),
            post_norm=self._floats(layer.post_norm_D),
            q_norm=self._floats(layer.q_norm_H),
            k_norm=self._floats(layer.k_norm_H),
            qkv=self._matrix(f"{prefix}.qkv", layer.qkv_ED, layer.qkv_bias_E),
            o=self._matrix(f"{prefix}.o", layer.o_DE, layer.o_bias_D),
            gate_up=self._matrix(f"{prefix}.gate_up", layer.gate_up_FD, layer.gate_up_bias_F, halves=True),
            down=self._matrix(f"{prefix}.down", layer.down_DF, layer.down_bias_D),
            window_tokens=window_tokens or 0,
        )

    def _matrix(
        self, name: str, weight: torch.Tensor, bias: torch.Tensor | None, *, halves: bool = False
    ) -> MatrixStruct:
        panels = self._next
        self._next += self._packed_bytes(name, *weight.shape, halves=halves)
        return self._packed(name, weight, bias, panels, halves=halves)

    def _embedding(self, weights: DecoderWeights, head: MatrixStruct) -> MatrixStruct:
        """The head itself where both are one matrix in one format. Else it is not among what each token reads."""
        packing = self._packings[EMBEDDING] = self._packing(EMBEDDING)
        if weights.embed_VD is weights.head_VD and (packing.format, packing.group) == (head.format, head.group):
            return head
        size = self._packed_bytes(EMBEDDING, *weights.embed_VD.shape)
        panels = self._keep(torch.zeros(size if self._saved is None else 0, dtype=torch.uint8))
        return self._packed(EMBEDDING, weights.embed_VD, None, panels)

    def _packed(
        self, name: str, weight: torch.Tensor, bias: torch.Tensor | None, panels: int, *, halves: bool = False
    ) -> MatrixStruct:
        """A matrix that is packed at `panels`, or was before it was saved."""
        packing, scales = self._packing(name), None
        self._packings[name] = packing
        rows, columns = weight.shape
        if self._saved is None:
            scales = self._pack(name, weight, panels, halves=halves)
        elif packing.format == CHANNEL8:
            scales = weight[:, 0]
        vectors = [vector if vector is None or not halves else _interleaved(vector) for vector in (bias, scales)]
        return MatrixStruct(
            panels=panels,
            bias=self._floats(vectors[0]),
            scales=self._floats(vectors[1]),
            out_features=rows,
            in_features=columns,
            format=packing.format,
            group=packing.group,
            byte_inputs=packing.byte_inputs,
        )

    def _pack(self, name: str, weight: torch.Tensor, panels: int, *, halves: bool) -> torch.Tensor | None:
        """Lay a matrix out; its scale an output, if it has them apart."""
        packing, scales = self._packing(name), None
        rows, columns = weight.shape
        if (stored := self._stored.get(name)) is not None:
            weight = stored.read()
        if packing.format == CHANNEL8:
            weight, scales = _as_int8(weight)
        weight = weight.contiguous()
        place = (weight.data_ptr(), rows, columns, panels)
        if packing.format in (PLAIN, CHANNEL8):
            self._library.pack(*place, number_bytes=weight.itemsize, halves=halves)
        else:
            self._library.pack_groups(*place, packing, number_bytes=weight.itemsize, halves=halves)
        return scales

    def _packed_bytes(self, name: str, rows: int, columns: int, *, halves: bool = False) -> int:
        packing = self._packing(name)
        size = self._library.packed_bytes(rows, columns, packing, number_bytes=self._number_bytes, halves=halves)
        return rounded_up(size, ALIGNMENT_BYTES)

    def _packing(self, name: str) -> Packing:
        if self._saved is not None:
            return self._saved.packings[name]
        stored = self._stored.get(name)
        return self._plan.packing(name, None if stored is None else stored.format)

    def _floats(self, vector: torch.Tensor | None) -> int | None:
        """Address of a copy in float32, padded with zeros to whole panels."""
        if vector is None:
            return None
        if self._saved is not None:
            return self._keep(vector)
        padded = torch.zeros(rounded_up(len(vector), PANEL))
        padded[: len(vector)] = vector
        return self._keep(padded)

    def _keep(self, tensor: torch.Tensor) -> int:
        # With a file's arrays, tensors say only that there is one more.
        tensor = tensor.contiguous() if self._saved is None else next(self._saved.arrays)
        self._kept.append(tensor)
        return tensor.data_ptr()


def _as_int8(weight_ED: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The nearest int8 matrix, and its scale an output."""
    scale_E = weight_ED.abs().amax(1).float().div_(127)
    divisor_E = scale_E.where(scale_E > 0, 1)
    return (weight_ED / divisor_E[:, None]).round_().to(torch.int8), scale_E


def _interleaved(vector_F: torch.Tensor) -> torch.Tensor:
    """The halves of gate and up, by 16, as their rows are packed."""
    halves = vector_F.view(2, -1)
    padded = vector_F.new_zeros(2, rounded_up(halves.shape[1], _HALF_PANEL))
    padded[:, : halves.shape[1]] = halves
    return padded.view(2, -1, _HALF_PANEL).transpose(0, 1).flatten()
