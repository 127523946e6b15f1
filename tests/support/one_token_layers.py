"""A layer of one token from one attention to the next: by `decode_layer`, and by the kernels that it stands for."""

from dataclasses import dataclass

import torch

from triode.kernels.decode_layer.gpu import COUNTERS, LayerMatrices, LayerVectors, Projection, finish_layer
from triode.kernels.decode_layer.plan import LayerPlan, LayerSizes
from triode.kernels.gpu_traits import GpuTraits
from triode.kernels.linear.gpu import linear_sequential
from triode.kernels.linear.tiles import linear_tile, qkv_tile, swiglu_tile
from triode.kernels.qkv_epilogue.fused import qkv_fused
from triode.kernels.rms_norm.gpu import add_rms_norm

POSITIONS = 64
EPS = 1e-6
BLOCK = 16


@dataclass
class OneTokenLayer:
    """Weights, and what was there before; `finish` and `finish_with_many_kernels` change it alike."""

    sizes: LayerSizes
    o: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor
    qkv: torch.Tensor
    bias: torch.Tensor | None
    post_norm: torch.Tensor
    next_norm: torch.Tensor
    attended: torch.Tensor
    residual: torch.Tensor
    angle: torch.Tensor
    place: torch.Tensor
    """Position, and slot."""

    @classmethod
    def random(
        cls, sizes: LayerSizes, device: str, *, dtype: torch.dtype = torch.bfloat16, bias: bool = True
    ) -> "OneTokenLayer":
        """Of normal numbers; the products of weights neither vanish nor overflow."""

        def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
            return (torch.randn(shape, device=device) * scale).to(dtype)

        hidden, inner = sizes.hidden, sizes.intermediate
        return cls(
            sizes=sizes,
            o=normal(hidden, sizes.attended, scale=0.02),
            gate_up=normal(2 * inner, hidden, scale=0.02),
            down=normal(hidden, inner, scale=0.02),
            qkv=normal(sizes.qkv, hidden, scale=0.02),
            bias=normal(sizes.qkv) if bias else None,
            post_norm=normal(hidden),
            next_norm=normal(hidden),
            attended=normal(1, sizes.attended),
            residual=normal(1, hidden),
            angle=torch.rand(POSITIONS, sizes.head_dim // 2, device=device),
            place=torch.tensor([37, 21], dtype=torch.int32, device=device),
        )

    def empty(self, *shape: int) -> torch.Tensor:
        """Nothing that a kernel may leave: NaN."""
        return torch.full(shape, torch.nan, dtype=self.residual.dtype, device=self.residual.device)

    def pool(self) -> tuple[torch.Tensor, torch.Tensor]:
        shape = 4, BLOCK, self.sizes.num_kv_heads, self.sizes.head_dim
        return self.empty(*shape), self.empty(*shape)

    def finish(
        self, plan: LayerPlan, traits: GpuTraits, *, last: bool = False, times: int = 1, count: int = 0
    ) -> list[torch.Tensor]:
        """The new residual, the down product, queries, and the pools of keys and values, of the last of several launches.

        What one has written, the next one does not find. Counters begin at `count`.
        """
        sizes = self.sizes
        key, value = self.pool()
        qkv = self.empty(1, sizes.qkv)
        residual, down = self.empty(sizes.hidden), self.empty(sizes.hidden)
        matrices = LayerMatrices.bind(self.o, self.gate_up, self.down, self.qkv, plan)
        vectors = LayerVectors(
            attended_A=self.attended[0],
            residual_D=self.residual[0],
            next_residual_D=residual,
            o_D=self.empty(sizes.hidden),
            gated_F=self.empty(sizes.intermediate),
            down_D=down,
            post_norm_D=self.post_norm,
            next_norm_D=self.next_norm,
            counters=torch.full((COUNTERS,), count, dtype=torch.int32, device=residual.device),
        )
        position, slot = self.place[:1], self.place[1:]
        cos, sin = self.angle.cos(), self.angle.sin()
        projection = Projection(self.bias, cos, sin, position, slot, qkv, key, value)
        written = (vectors.o_D, vectors.gated_F, down, residual, qkv, key, value)
        for _ in range(times):
            for tensor in written:
                tensor.fill_(torch.nan)
            finish_layer(matrices, vectors, projection, EPS, plan, traits, last=last)
        return [residual, down, qkv[0, : sizes.attended], key, value]

    def finish_with_many_kernels(self, traits: GpuTraits, *, last: bool = False) -> list[torch.Tensor]:
        """The same."""
        sizes = self.sizes
        key, value = self.pool()
        qkv, hidden, x = self.empty(1, sizes.qkv), self.empty(1, sizes.hidden), self.empty(1, sizes.hidden)
        gated, residual = self.empty(1, sizes.intermediate), self.residual.clone()
        linear_sequential(self.attended, self.o, x, linear_tile(sizes.hidden, sizes.attended, 1), traits)
        add_rms_norm(x, residual, self.post_norm, EPS, hidden, traits)
        tile = swiglu_tile(sizes.intermediate, sizes.hidden, 1)
        linear_sequential(hidden, self.gate_up, gated, tile, traits, swiglu=True)
        linear_sequential(gated, self.down, x, linear_tile(sizes.hidden, sizes.intermediate, 1), traits)
        if not last:
            add_rms_norm(x, residual, self.next_norm, EPS, hidden, traits)
            places = self.angle.cos(), self.angle.sin(), self.place[:1], self.place[1:], key, value
            tile = qkv_tile(sizes.qkv // 2, sizes.hidden)
            qkv_fused(hidden, self.qkv, qkv, *places, sizes.num_heads, tile, traits, bias_E=self.bias)
        return [residual[0], x[0], qkv[0, : sizes.attended], key, value]
