"""The weights of a model as the compiled step reads them: packed matrices, padded vectors, and the table of addresses."""

from collections.abc import Iterable

import torch

from triode.kernels.native.library import LayerStruct, MatrixStruct, ModelStruct, NativeLibrary
from triode.models.config import ModelConfig, Quantization
from triode.models.rope import rope_table
from triode.models.weights import DecoderWeights, LayerWeights

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
        quantization: Quantization,
    ) -> None:
        self._library = library
        self._is_quantized = quantization == "a16w8"
        self._number_bytes = 1 if self._is_quantized else weights.embed_VD.dtype.itemsize
        self._kept: list[torch.Tensor] = []
        num_bytes = self._num_bytes(config)
        self._panels = torch.empty(num_bytes + ALIGNMENT_BYTES, dtype=torch.uint8)
        self._next = rounded_up(self._panels.data_ptr(), ALIGNMENT_BYTES)
        library.prefer_huge_pages(self._next, num_bytes)

        rope = rope_table(config, torch.device("cpu"))
        self.layers = (LayerStruct * config.num_layers)(
            *(self._layer(layer, config.window_tokens(index)) for index, layer in enumerate(layers))
        )
        self.model = ModelStruct(
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
            embedding=self._keep(weights.embed_VD),
            final_norm=self._floats(weights.final_norm_D),
            cos=self._keep(rope.cos_XU),
            sin=self._keep(rope.sin_XU),
            layers=self.layers,
            head=self._matrix(weights.head_VD, None),
        )

    def _num_bytes(self, config: ModelConfig) -> int:
        """Of all packed matrices."""
        D, F = config.hidden_size, config.intermediate_size
        layer_bytes = (
            self._packed_bytes(config.q_size + 2 * config.kv_size, D)
            + self._packed_bytes(D, config.q_size)
            + self._packed_bytes(2 * F, D, halves=True)
            + self._packed_bytes(D, F)
        )
        return config.num_layers * layer_bytes + self._packed_bytes(config.vocab_size, D)

    def _layer(self, layer: LayerWeights, window_tokens: int | None) -> LayerStruct:
        return LayerStruct(
            input_norm=self._floats(layer.input_norm_D),
            post_norm=self._floats(layer.post_norm_D),
            q_norm=self._floats(layer.q_norm_H),
            k_norm=self._floats(layer.k_norm_H),
            qkv=self._matrix(layer.qkv_ED, layer.qkv_bias_E),
            o=self._matrix(layer.o_DE, layer.o_bias_D),
            gate_up=self._matrix(layer.gate_up_FD, layer.gate_up_bias_F, halves=True),
            down=self._matrix(layer.down_DF, layer.down_bias_D),
            window_tokens=window_tokens or 0,
        )

    def _matrix(self, weight: torch.Tensor, bias: torch.Tensor | None, *, halves: bool = False) -> MatrixStruct:
        rows, columns = weight.shape
        weight, scales = _as_int8(weight) if self._is_quantized else (weight.contiguous(), None)
        panels = self._next
        self._library.pack(weight.data_ptr(), rows, columns, panels, number_bytes=self._number_bytes, halves=halves)
        self._next += self._packed_bytes(rows, columns, halves=halves)
        vectors = [vector if vector is None or not halves else _interleaved(vector) for vector in (bias, scales)]
        return MatrixStruct(
            panels=panels,
            bias=self._floats(vectors[0]),
            scales=self._floats(vectors[1]),
            out_features=rows,
            in_features=columns,
        )

    def _packed_bytes(self, rows: int, columns: int, *, halves: bool = False) -> int:
        return self._library.packed_bytes(rows, columns, number_bytes=self._number_bytes, halves=halves)

    def _floats(self, vector: torch.Tensor | None) -> int | None:
        """Address of a copy in float32, padded with zeros to whole panels."""
        if vector is None:
            return None
        padded = torch.zeros(rounded_up(len(vector), PANEL))
        padded[: len(vector)] = vector
        return self._keep(padded)

    def _keep(self, tensor: torch.Tensor) -> int:
        tensor = tensor.contiguous()
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
