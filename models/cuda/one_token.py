"""Steps of one token on a Hopper GPU: two launches a layer, attention and all that lies between it and the next one.

D hidden    E q, k and v features    N query heads    K KV heads    H head dim    P blocks    B block size
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from triode.kernels.decode_layer.gpu import COUNTERS, LayerMatrices, LayerVectors, Projection, finish_layer
from triode.kernels.decode_layer.plan import LayerPlan, LayerSizes, layer_plan
from triode.models.config import ModelConfig
from triode.models.weights import DecoderWeights, LayerWeights

if TYPE_CHECKING:
    from triode.models.cuda.decoder import CudaDecoder
    from triode.models.cuda.layer import Buffers, TokenPlaces


class OneTokenLayers:
    """What follows attention in each layer, up to the next layer's queries, keys and values.

    The bits are those of the kernels of many tokens.
    """

    def __init__(self, config: ModelConfig, weights: DecoderWeights, plan: LayerPlan, decoder: "CudaDecoder") -> None:
        self._config = config
        self._layers = weights.layers
        self._plan = plan
        self._traits = decoder.traits
        self._rope = decoder.rope
        self._other_residual_D = torch.empty(config.hidden_size, dtype=decoder.dtype, device=decoder.device)
        self._counters = torch.zeros(COUNTERS, dtype=torch.int32, device=decoder.device)
        self._matrices = [
            LayerMatrices.bind(layer.o_DE, layer.gate_up_FD, layer.down_DF, self._after(index).qkv_ED, plan)
            for index, layer in enumerate(weights.layers)
        ]

    @classmethod
    def of(cls, config: ModelConfig, weights: DecoderWeights, decoder: "CudaDecoder") -> "OneTokenLayers | None":
        """None where the model has what the kernel lacks, or other kernels are faster."""
        sizes = LayerSizes(
            config.hidden_size, config.intermediate_size, config.num_heads, config.num_kv_heads, config.head_dim
        )
        plan = layer_plan(sizes, decoder.dtype, decoder.traits)
        rotates_whole = 2 * decoder.rope.cos_XU.shape[1] == config.head_dim
        if plan is None or not rotates_whole or config.qk_norm or config.o_bias or config.mlp_bias:
            return None
        return cls(config, weights, plan, decoder)

    def finish(
        self,
        index: int,
        keys_PBKH: Sequence[torch.Tensor],
        values_PBKH: Sequence[torch.Tensor],
        places: "TokenPlaces",
        buffers: "Buffers",
    ) -> None:
        """Layer `index` behind its attention. After the last one `x` has yet to be added to `residual(...)`."""
        last = index + 1 == len(self._layers)
        after = 0 if last else index + 1
        finish_layer(
            self._matrices[index],
            LayerVectors(
                attended_A=buffers.attended_TNH[0].flatten(),
                residual_D=self.residual(index, buffers),
                next_residual_D=self.residual(index + 1, buffers),
                o_D=buffers.hidden_TD[0],
                gated_F=buffers.activated_TF[0],
                down_D=buffers.x_TD[0],
                post_norm_D=self._layers[index].post_norm_D,
                next_norm_D=self._layers[after].input_norm_D,
                counters=self._counters,
            ),
            Projection(
                bias_E=self._layers[after].qkv_bias_E,
                cos_XU=self._rope.cos_XU,
                sin_XU=self._rope.sin_XU,
                position_T=places.position_T,
                slot_T=places.kv_slot_T,
                qkv_TE=buffers.qkv_TE,
                key_PBKH=keys_PBKH[after],
                value_PBKH=values_PBKH[after],
            ),
            self._config.rms_norm_eps,
            self._plan,
            self._traits,
            last=last,
        )

    def residual(self, num_layers: int, buffers: "Buffers") -> torch.Tensor:
        """The residual behind so many layers: the kernel reads it from one buffer and writes it to the other."""
        return self._other_residual_D if num_layers % 2 else buffers.residual_TD[0]

    def _after(self, index: int) -> LayerWeights:
        """The next layer; the first one stands in where there is none."""
        return self._layers[(index + 1) % len(self._layers)]
