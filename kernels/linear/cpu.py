"""Matrix products on the CPU in which no row depends on the others.

Weights are laid out once in oneDNN's own format, which is 1.3 to 4 times as fast as torch's `linear` from 1 to 1,024
rows, in float32 and bfloat16. Where oneDNN cannot (float16 without hardware for it), torch's `linear` remains.

Both libraries choose a kernel by the number of rows, and kernels add in different orders: float32 differs in the last
bits at 1, 2, 3, 5 and 7 rows, bfloat16 at 1. Rows are therefore padded to a multiple of 4. That this suffices is a
property of the library and the processor, not a law, so each weight shape is checked when a model is loaded
(`row_check.py`), and gets coarser padding, or blocks of a fixed size, where the check finds a difference.

    T tokens     D in features     E out features
"""

from functools import partial

import torch

from triode.kernels.linear.reference import PreparedLinear, prepare_linear
from triode.kernels.linear.row_check import RowRule, find_row_rule


class CpuLinears:
    """Prepares the weights of one dtype, and remembers what was found for each shape."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._rules: dict[tuple[int, int], RowRule] = {}
        self._packs = _can_pack(dtype)

    @property
    def name(self) -> str:
        """Whose matrix product it is."""
        return "onednn" if self._packs else "torch"

    def __call__(self, weight_ED: torch.Tensor, bias_E: torch.Tensor | None = None) -> PreparedLinear:
        """Lay the weight out and check its shape, once a shape."""
        E, D = weight_ED.shape
        product = self._product(weight_ED, bias_E)
        rule = self._rules.get((E, D))
        if rule is None:
            rule = find_row_rule(product, D, E, weight_ED.dtype)
            self._rules[E, D] = rule
        return partial(_by_rule, product, rule)

    def exceptions(self) -> list[str]:
        """The weight shapes that need more than the usual padding, each with what it gets."""
        usual = RowRule()
        return [f"linear {E} × {D}: {rule}" for (E, D), rule in self._rules.items() if rule != usual]

    def _product(self, weight_ED: torch.Tensor, bias_E: torch.Tensor | None) -> PreparedLinear:
        if not self._packs:
            return prepare_linear(weight_ED, bias_E)
        packed = torch.ops.mkldnn._reorder_linear_weight(weight_ED)
        return partial(_packed_linear, weight=packed, bias_E=bias_E)


def _packed_linear(x_TD: torch.Tensor, weight: torch.Tensor, bias_E: torch.Tensor | None) -> torch.Tensor:
    y_TE: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x_TD, weight, bias_E, "none", [], "")
    return y_TE


def _can_pack(dtype: torch.dtype) -> bool:
    """Whether this build of torch has oneDNN and this processor the instructions that it wants for `dtype`."""
    if not torch.backends.mkldnn.is_available():
        return False
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(torch.zeros(16, 16, dtype=dtype))
        _packed_linear(torch.zeros(4, 16, dtype=dtype), packed, None)
    except RuntimeError:
        return False
    return True


def _by_rule(product: PreparedLinear, rule: RowRule, x_TD: torch.Tensor) -> torch.Tensor:
    num_rows = x_TD.shape[0]
    missing = -num_rows % rule.multiple
    if missing:
        x_TD = torch.cat((x_TD, x_TD.new_zeros(missing, x_TD.shape[1])))
    blocks = [x_TD] if rule.block is None else x_TD.split(rule.block)
    y_TE = torch.cat([product(block) for block in blocks]) if len(blocks) > 1 else product(x_TD)
    return y_TE[:num_rows]
