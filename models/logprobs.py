"""Log-probabilities of tokens in the model's own distribution, with rank and alternatives.

R rows        V vocabulary
"""

from collections.abc import Callable, Sequence

import torch

from triode.ids import TokenId
from triode.models.step import TokenLogprobs

SCORED_POSITIONS = 32
"""Positions whose logits exist at once: a long prompt never materialises T × V of them."""


def score(logprobs_RV: torch.Tensor, token_ids: Sequence[int], num_alternatives: Sequence[int]) -> list[TokenLogprobs]:
    """Each row's token, beside as many of its most probable tokens as the row asks for, the lowest id among equals.

    Args:
        logprobs_RV: log-softmax of the raw logits.
        token_ids: R tokens.
        num_alternatives: R numbers; more than V gives V alternatives.
    """
    token_R1 = torch.tensor(token_ids, device=logprobs_RV.device)[:, None]
    logprob_R1 = logprobs_RV.gather(-1, token_R1)
    ranks = ((logprobs_RV > logprob_R1).sum(-1) + 1).tolist()
    pairs_RK = _most_probable(logprobs_RV, min(max(num_alternatives), logprobs_RV.shape[-1]))
    return [
        TokenLogprobs(
            token_id=TokenId(token_id),
            logprob=logprob,
            rank=rank,
            top_ids=tuple(TokenId(top_id) for _, top_id in pairs[:num]),
            top_logprobs=tuple(value for value, _ in pairs[:num]),
        )
        for token_id, logprob, rank, pairs, num in zip(
            token_ids, logprob_R1[:, 0].tolist(), ranks, pairs_RK, num_alternatives, strict=True
        )
    ]


def score_positions(
    hidden_TD: torch.Tensor,
    next_ids: Sequence[int],
    num_alternatives: int,
    head: Callable[[torch.Tensor], torch.Tensor],
) -> tuple[TokenLogprobs, ...]:
    """The token that follows each of the first positions, for as many positions as there are tokens.

    `head` makes logits of hidden states.
    """
    scores: list[TokenLogprobs] = []
    for first in range(0, len(next_ids), SCORED_POSITIONS):
        tile_ids = next_ids[first : first + SCORED_POSITIONS]
        logprobs_TV = torch.log_softmax(head(hidden_TD[first : first + len(tile_ids)]), dim=-1)
        scores += score(logprobs_TV, tile_ids, [num_alternatives] * len(tile_ids))
    return tuple(scores)


def _most_probable(logprobs_RV: torch.Tensor, num: int) -> list[list[tuple[float, int]]]:
    """Per row `num` pairs (logprob, token id) in descending order, the lowest id first among equals."""
    # One more than asked for shows whether the last one has equals that are left out: topk takes any of them.
    top = logprobs_RV.topk(min(num + 1, logprobs_RV.shape[-1]))
    rows = []
    for logprobs_V, values, ids in zip(logprobs_RV, top.values.tolist(), top.indices.tolist(), strict=True):
        pairs = list(zip(values, ids, strict=True))
        if 0 < num < len(values) and values[num - 1] == values[num]:
            equal_ids = (logprobs_V == values[num]).nonzero()[:, 0].tolist()
            pairs = [pair for pair in pairs if pair[0] > values[num]] + [(values[num], token) for token in equal_ids]
        rows.append(sorted(pairs, key=lambda pair: (-pair[0], pair[1]))[:num])
    return rows
