"""Logprobs of sampled tokens, computed behind the sampler and read when the step's result is.

R rows    Q rows that asked    V vocabulary    K alternatives
"""

from collections.abc import Sequence

import torch

from triode.ids import TokenId
from triode.models.cuda.gpu import Gpu
from triode.models.step import TokenLogprobs


class PendingScores:
    """Logprobs on their way to the host. Made of raw logits, before anything changes them."""

    def __init__(self, logits_RV: torch.Tensor, rows: Sequence[int], num_alternatives: Sequence[int], gpu: Gpu) -> None:
        self._gpu = gpu
        self._rows = tuple(rows)
        self._num_alternatives = tuple(num_alternatives)
        self._row_Q = gpu.upload(torch.tensor(rows, dtype=torch.int32).numpy()).long()
        self._logprobs_QV = torch.log_softmax(logits_RV[self._row_Q], dim=-1)
        self._downloads: tuple[torch.Tensor, ...] = ()

    def finish(self, token_R: torch.Tensor) -> None:
        """The tokens are chosen: start to bring home their logprobs, ranks and alternatives."""
        # A row without a token is scored as token 0 and left out by the reader.
        token_Q1 = token_R[self._row_Q].long().clamp(min=0)[:, None]
        # At least one, so that there is a least one.
        num = min(max(1, *self._num_alternatives), self._logprobs_QV.shape[1])
        logprob_Q1 = self._logprobs_QV.gather(1, token_Q1)
        rank_Q = (self._logprobs_QV > logprob_Q1).sum(-1) + 1
        top_QK = most_probable(self._logprobs_QV, num)
        parts = (token_Q1[:, 0], logprob_Q1[:, 0], rank_Q, top_QK, self._logprobs_QV.gather(1, top_QK))
        self._downloads = tuple(self._gpu.download(part) for part in parts)
        del self._logprobs_QV

    def read(self) -> dict[int, TokenLogprobs]:
        """An entry for each row that asked; the step's last mark has been passed."""
        columns = [part.tolist() for part in self._downloads]
        return {
            row: TokenLogprobs(
                token_id=TokenId(token_id),
                logprob=logprob,
                rank=rank,
                top_ids=tuple(map(TokenId, top_ids[:num])),
                top_logprobs=tuple(top_logprobs[:num]),
            )
            for row, num, token_id, logprob, rank, top_ids, top_logprobs in zip(
                self._rows, self._num_alternatives, *columns, strict=True
            )
        }


def most_probable(logprobs_RV: torch.Tensor, num: int) -> torch.Tensor:
    """The `num` most probable tokens of each row in descending order, the lowest id first among equals.

    topk takes any of equal values. So it finds only the least value that belongs to the answer, and what lies above it;
    among the tokens of that value the lowest ids are found by a second one, over the ids themselves.
    """
    vocab_size = logprobs_RV.shape[1]
    above = logprobs_RV.topk(num, dim=-1)
    least_R1 = above.values[:, -1:]
    # float32 holds every id exactly.
    id_V = torch.arange(vocab_size, dtype=torch.float32, device=logprobs_RV.device)
    equal_RV = id_V.where(logprobs_RV == least_R1, torch.inf)
    equal_RK = equal_RV.topk(num, dim=-1, largest=False).values
    id_RK = above.indices.where(above.values > least_R1, vocab_size)
    id_RL = torch.cat([id_RK, equal_RK.clamp(max=vocab_size).long()], dim=1)
    value_RL = torch.cat([above.values, least_R1.expand_as(above.values)], dim=1)
    value_RL = value_RL.masked_fill(id_RL == vocab_size, -torch.inf)
    # By id, then by value: a stable sort keeps the first order among equals of the second.
    by_id = id_RL.argsort(dim=1)
    by_value = value_RL.gather(1, by_id).argsort(dim=1, descending=True, stable=True)[:, :num]
    return id_RL.gather(1, by_id.gather(1, by_value)).clamp(max=vocab_size - 1)
