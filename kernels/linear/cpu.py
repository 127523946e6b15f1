"""Matrix products on the CPU in which no row depends on the others.

Weights are laid out once in oneDNN's own format, which is 1.3 to 4 times as fast as torch's `linear` from 1 to 1,024
rows, in float32 and bfloat16. Where oneDNN cannot (float16 without hardware for it), torch's `linear` remains.

Both libraries choose a kernel by the number of rows, and kernels add in different orders: float32 differs in the last
bits at 1, 2, 3, 5 and 7 rows, bfloat16 at 1. Rows are therefore padded to a multiple of 4. That this suffices is a
property of the library and the processor, not a law, so each weight shape is checked when a model is loaded
(`row_check.py`), and gets coarser padding, or blocks of a fixed size, where the check finds a difference.

oneDNN applies what follows a product before it rounds: SwiGLU's silu and product, and the sum with the residual. That
spares several passes over memory. The check covers the product with what is fused to it.

    T tokens     D in features     E out features     F intermediate features
"""

from functools import partial

import torch

from triode.kernels.linear.reference import AddingLinear, PreparedLinear, adding, gated, prepare_linear
from triode.kernels.linear.row_check import RowRule, find_row_rule


class CpuLinears:
    """Prepares the weights of one dtype, and remembers what was found for each shape."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._rules: dict[tuple[int, int, str], RowRule] = {}
        self._packs = _can_pack(dtype)

    @property
    def name(self) -> str:
        """Whose matrix product it is."""
        return "onednn" if self._packs else "torch"

    @property
    def swiglu_name(self) -> str:
        """Who computes SwiGLU."""
        return "onednn" if self._packs else "reference"

    def __call__(self, weight_ED: torch.Tensor, bias_E: torch.Tensor | None = None) -> PreparedLinear:
        """Lay the weight out and check its shape, once a shape."""
        if not self._packs:
            product = prepare_linear(weight_ED, bias_E)
        else:
            product = partial(_packed_linear, weight=_pack(weight_ED), bias_E=bias_E)
        return partial(_by_rule, product, self._rule(product, weight_ED, "plain"))

    def gated(self, gate_up_FD: torch.Tensor, bias_F: torch.Tensor | None = None) -> PreparedLinear:
        """`silu(gate) * up`, the gate being the first half of the rows."""
        if not self._packs:
            return gated(self(gate_up_FD, bias_F))
        gate_FD, up_FD = gate_up_FD.chunk(2)
        gate_bias_F, up_bias_F = (None, None) if bias_F is None else bias_F.chunk(2)
        product = partial(
            _packed_gated, gate=_pack(gate_FD), gate_bias_F=gate_bias_F, up=_pack(up_FD), up_bias_F=up_bias_F
        )
        return partial(_by_rule, product, self._rule(product, up_FD, "gated"))

    def adding(self, weight_ED: torch.Tensor, bias_E: torch.Tensor | None = None) -> AddingLinear:
        """The product added to a residual."""
        if not self._packs:
            return adding(self(weight_ED, bias_E))
        product = partial(_packed_adding, weight=_pack(weight_ED), bias_E=bias_E)

        def with_residual(x_TD: torch.Tensor) -> torch.Tensor:
            return product(x_TD, x_TD[:, :1].expand(-1, weight_ED.shape[0]).contiguous())

        return partial(_by_rule, product, self._rule(with_residual, weight_ED, "adding"))

    def exceptions(self) -> list[str]:
        """The weight shapes that need more than the usual padding, each with what it gets."""
        usual = RowRule()
        found = {f"linear {E} × {D}: {rule}": None for (E, D, _), rule in self._rules.items() if rule != usual}
        return list(found)

    def _rule(self, product: PreparedLinear, weight_ED: torch.Tensor, kind: str) -> RowRule:
        E, D = weight_ED.shape
        rule = self._rules.get((E, D, kind))
        if rule is None:
            rule = self._rules[E, D, kind] = find_row_rule(product, D, E, weight_ED.dtype)
        return rule


def _pack(weight_ED: torch.Tensor) -> torch.Tensor:
    packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight_ED)
    return packed


def _packed_linear(
    x_TD: torch.Tensor, weight: torch.Tensor, bias_E: torch.Tensor | None, after: str = "none"
) -> torch.Tensor:
    y_TE: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x_TD, weight, bias_E, after, [], "")
    return y_TE


def _packed_adding(
    x_TD: torch.Tensor, residual_TE: torch.Tensor, weight: torch.Tensor, bias_E: torch.Tensor | None
) -> torch.Tensor:
    y_TE: torch.Tensor = torch.ops.mkldnn._linear_pointwise.binary(x_TD, residual_TE, weight, bias_E, "add")
    return y_TE


def _packed_gated(
    x_TD: torch.Tensor,
    gate: torch.Tensor,
    gate_bias_F: torch.Tensor | None,
    up: torch.Tensor,
    up_bias_F: torch.Tensor | None,
) -> torch.Tensor:
    # oneDNN calls silu swish.
    silu_TF = _packed_linear(x_TD, gate, gate_bias_F, "swish")
    y_TF: torch.Tensor = torch.ops.mkldnn._linear_pointwise.binary(x_TD, silu_TF, up, up_bias_F, "mul")
    return y_TF


def _can_pack(dtype: torch.dtype) -> bool:
    """Whether this build of torch has oneDNN and this processor the instructions that it wants for `dtype`."""
    if not torch.backends.mkldnn.is_available():
        return False
    try:
        _packed_linear(torch.zeros(4, 16, dtype=dtype), _pack(torch.zeros(16, 16, dtype=dtype)), None)
    except RuntimeError:
        return False
    return True


def _by_rule(product: PreparedLinear | AddingLinear, rule: RowRule, *rows: torch.Tensor) -> torch.Tensor:
    """The product of arguments that all have T rows."""
    num_rows = rows[0].shape[0]
    missing = -num_rows % rule.multiple
    if missing:
        rows = tuple(torch.cat((part, part.new_zeros(missing, part.shape[1]))) for part in rows)
    if rule.block is None or num_rows <= rule.block:
        y_TE = product(*rows)
    else:
        blocks = zip(*(part.split(rule.block) for part in rows), strict=True)
        y_TE = torch.cat([product(*block) for block in blocks])
    return y_TE[:num_rows] if missing else y_TE
