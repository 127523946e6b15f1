"""NativeDecoder: a `Decoder` whose step is one call into compiled code.

It takes and gives what `Decoder` does. Its numbers differ from the torch kernels' in the last bits (residual stream and
logits are float32 throughout, sums run in another order), and keep the same promise: a token's result depends on its own
sequence alone.

    T packed tokens     R rows     D hidden     V vocab     P blocks     B block size     K KV heads     H head dim
"""

import ctypes
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from triode.kernels.native.isa import InstructionSet
from triode.kernels.native.library import BatchStruct, LayerStruct, MatrixStruct, ModelStruct, NativeLibrary
from triode.models.batch import StepBatch
from triode.models.config import ModelConfig, Quantization
from triode.models.rope import rope_table
from triode.models.weights import DecoderWeights, LayerWeights

DTYPES = (torch.float32, torch.bfloat16)
OPERATIONS = ("linear", "rms_norm", "rotary", "store_kv", "swiglu", "paged_attention")
_PANEL = 64
_HALF_PANEL = 16
_ALIGNMENT_BYTES = 64


@dataclass(frozen=True, slots=True)
class NativeKernels:
    """What a runner asks of a decoder's kernels."""

    names: dict[str, str]
    row_multiple: int = 1


def native_names(isa: InstructionSet, quantization: Quantization = "none") -> dict[str, str]:
    """Operation to implementation, for a build."""
    names = dict.fromkeys(OPERATIONS, f"native ({isa.name})")
    return names if quantization == "none" else names | {"linear": f"native ({isa.name}, {quantization})"}


class NativeDecoder:
    """Packs the weights once, which may be dropped then, and computes steps from the packed copy.

    A step runs on as many threads as torch would use (`torch.get_num_threads`).

    Args:
        config: the model's sizes.
        weights: its tensors.
        library: what computes with them.
        layers: taken instead of `weights.layers`, one at a time, so that each can be freed before the next is packed.
        quantization: "a16w8" keeps matrices, the head's included, as int8 with a scale an output.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: DecoderWeights,
        library: NativeLibrary,
        layers: Iterable[LayerWeights] | None = None,
        quantization: Quantization = "none",
    ) -> None:
        if weights.embed_VD.dtype not in DTYPES:
            raise ValueError(f"dtype must be float32 or bfloat16 for native kernels, got {weights.embed_VD.dtype}")
        self.config = config
        self.kernels = NativeKernels(native_names(library.isa, quantization))
        self.device = weights.embed_VD.device
        self.dtype = weights.embed_VD.dtype
        self._library = library
        layers = weights.layers if layers is None else layers
        self._memory = _ModelMemory(library, config, weights, layers, quantization)
        self._model = self._memory.model
        self._scratch = torch.empty(0, dtype=torch.uint8)
        self._pool: tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]] | None = None
        self._pool_addresses = (_addresses(()), _addresses(()))

    def forward(
        self, batch: StepBatch, keys_PBKH: Sequence[torch.Tensor], values_PBKH: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        """Compute one step and store its keys and values.

        Args:
            batch: the step's tokens, without padding.
            keys_PBKH: each layer's keys (`KVPool.keys`), contiguous, in the dtype of the weights.
            values_PBKH: each layer's values.

        Returns:
            The hidden states after the final norm, [T, D].
        """
        self._bind_pool(keys_PBKH, values_PBKH)
        rows = batch.rows
        hidden_TD = torch.empty(batch.num_tokens, self.config.hidden_size, dtype=self.dtype)
        # Held here until the call returns.
        arrays = [np.ascontiguousarray(a) for a in (rows.query_start_R1, rows.start_R, rows.block_table_RC)]
        query_start_R1, start_R, block_table_RC = arrays
        struct = BatchStruct(
            num_tokens=len(batch.token_ids_T),
            num_rows=len(start_R),
            table_columns=block_table_RC.shape[1],
            block_size_tokens=rows.block_size_tokens,
            num_blocks=len(keys_PBKH[0]),
            token_ids=batch.token_ids_T.data_ptr(),
            positions=batch.positions_PT.data_ptr(),
            slots=batch.slot_T.data_ptr(),
            query_start=query_start_R1.ctypes.data,
            start=start_R.ctypes.data,
            block_table=block_table_RC.ctypes.data,
            keys=ctypes.addressof(self._pool_addresses[0]),
            values=ctypes.addressof(self._pool_addresses[1]),
            hidden=hidden_TD.data_ptr(),
        )
        num_threads = torch.get_num_threads()
        self._library.forward(self._model, struct, self._working_memory(batch.num_tokens, num_threads), num_threads)
        return hidden_TD

    def logits(self, hidden_RD: torch.Tensor) -> torch.Tensor:
        """float32 logits [R, V] of the rows that need them."""
        hidden_RD = hidden_RD.contiguous()
        num_rows, num_threads = len(hidden_RD), torch.get_num_threads()
        out = torch.empty(num_rows, _rounded_up(self.config.vocab_size, _PANEL))
        scratch = self._working_memory(num_rows, num_threads)
        self._library.logits(self._model, hidden_RD.data_ptr(), num_rows, out.data_ptr(), scratch, num_threads)
        return out[:, : self.config.vocab_size]

    def _bind_pool(self, keys_PBKH: Sequence[torch.Tensor], values_PBKH: Sequence[torch.Tensor]) -> None:
        """Look up where the cache is, once a pool."""
        if self._pool is not None and self._pool[0] is keys_PBKH and self._pool[1] is values_PBKH:
            return
        config = self.config
        for tensor in (*keys_PBKH, *values_PBKH):
            assert tensor.is_contiguous(), "the cache is contiguous"
            assert tensor.dtype == self.dtype, f"the cache is {self.dtype}"
            assert tensor.shape[2:] == (config.num_kv_heads, config.head_dim), "the cache has the model's heads"
        assert len(keys_PBKH) == len(values_PBKH) == config.num_layers, "the cache has the model's layers"
        self._pool = (keys_PBKH, values_PBKH)
        self._pool_addresses = (_addresses(keys_PBKH), _addresses(values_PBKH))

    def _working_memory(self, num_tokens: int, num_threads: int) -> int:
        """The address of enough scratch memory; it grows with the largest step."""
        needed = self._library.scratch_bytes(self._model, num_tokens, num_threads)
        if len(self._scratch) < needed + _ALIGNMENT_BYTES:
            # Whatever is left in it must not be mistaken for numbers, which a test proves with NaN.
            self._scratch = torch.full((needed + _ALIGNMENT_BYTES,), 0xFF, dtype=torch.uint8)
        return _rounded_up(self._scratch.data_ptr(), _ALIGNMENT_BYTES)


class _ModelMemory:
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
        self._panels = torch.empty(num_bytes + _ALIGNMENT_BYTES, dtype=torch.uint8)
        self._next = _rounded_up(self._panels.data_ptr(), _ALIGNMENT_BYTES)
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
        padded = torch.zeros(_rounded_up(len(vector), _PANEL))
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
    padded = vector_F.new_zeros(2, _rounded_up(halves.shape[1], _HALF_PANEL))
    padded[:, : halves.shape[1]] = halves
    return padded.view(2, -1, _HALF_PANEL).transpose(0, 1).flatten()


def _addresses(tensors: Sequence[torch.Tensor]) -> "ctypes.Array[ctypes.c_void_p]":
    return (ctypes.c_void_p * len(tensors))(*(tensor.data_ptr() for tensor in tensors))


def _rounded_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
