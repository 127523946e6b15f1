"""y = x Wᵀ + b in plain torch. T tokens, D in features, E out features."""

from collections.abc import Callable
from functools import partial

import torch

from triode.kernels.swiglu.reference import swiglu

PreparedLinear = Callable[[torch.Tensor], torch.Tensor]
"""x_TD to y_TE for a weight that an implementation has laid out as it likes."""

AddingLinear = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""x_TD and a residual [T, E] to their sum, the product added. The residual may be overwritten."""


def linear(x_TD: torch.Tensor, weight_ED: torch.Tensor, bias_E: torch.Tensor | None = None) -> torch.Tensor:
    """The product as torch computes it: a row's last bits may depend on the number of rows."""
    return torch.nn.functional.linear(x_TD, weight_ED, bias_E)


def prepare_linear(weight_ED: torch.Tensor, bias_E: torch.Tensor | None = None) -> PreparedLinear:
    """`linear` with a fixed weight."""
    return partial(linear, weight_ED=weight_ED, bias_E=bias_E)


def gated(gate_up: PreparedLinear) -> PreparedLinear:
    """`silu(gate) * up` of a product whose first half of columns is the gate."""
    return lambda x_TD: swiglu(gate_up(x_TD))


def adding(product: PreparedLinear) -> AddingLinear:
    """`residual + product(x)`."""
    return lambda x_TD, residual_TE: residual_TE.add_(product(x_TD))
