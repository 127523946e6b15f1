"""What quantised weights stand for, in float64, by the formats' definitions and not by the kernels' code."""

import torch


def rounded_weight(weight_ED: torch.Tensor, quantization: str, group: int | None) -> torch.Tensor:
    """The nearest matrix that the format can hold."""
    if quantization == "a16w8" and not group:
        scale = weight_ED.double().abs().amax(1, keepdim=True) / 127
        return (weight_ED.double() / scale).round() * scale
    groups = _in_groups(weight_ED, _size(weight_ED, group, 64 if quantization.endswith("w8") else 32))
    if quantization.endswith("w8"):
        scale = (groups.float().nan_to_num().abs().amax(-1, keepdim=True) / 127).bfloat16().double()
        stored = (groups / scale.where(scale > 0, 1)).round()
        whole = stored * scale
    else:
        least = groups.nan_to_num(torch.inf).amin(-1, keepdim=True).bfloat16().double()
        most = groups.nan_to_num(-torch.inf).amax(-1, keepdim=True)
        scale = ((most.float() - least.float()) / 15).bfloat16().double()
        stored = ((groups.nan_to_num() - least) / scale.where(scale > 0, 1)).round().clamp(0, 15)
        whole = stored * scale + least
    return whole.flatten(1)[:, : weight_ED.shape[1]]


def rounded_inputs(x_TD: torch.Tensor, group: int) -> torch.Tensor:
    """Rows as 8-bit activations: the nearest bytes, times a scale for each group."""
    groups = _in_groups(x_TD, group or x_TD.shape[1]).nan_to_num()
    most = groups.abs().amax(-1, keepdim=True)
    # bfloat16 numbers often lie halfway between two bytes: these are chosen in the precision of the kernels. `127 / most`
    # would be a reciprocal times 127 in torch.
    inverse = torch.tensor(127.0).div(most.where(most > 0, 1).float())
    stored = (groups.float() * inverse).round()
    return (stored.double() * most / 127).flatten(1)[:, : x_TD.shape[1]]


def _size(x_ED: torch.Tensor, group: int | None, default: int) -> int:
    """Of groups: 0 stands for whole rows."""
    return default if group is None else group or x_ED.shape[1]


def _in_groups(x_ED: torch.Tensor, group: int) -> torch.Tensor:
    """[E, groups, group] in float64; what is missing in the last group is NaN."""
    padding = -x_ED.shape[1] % group
    padded = torch.nn.functional.pad(x_ED.double(), (0, padding), value=torch.nan)
    return padded.reshape(x_ED.shape[0], -1, group)
