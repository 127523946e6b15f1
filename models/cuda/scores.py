"""Logprobs of sampled tokens, computed behind the sampler and read when the step's result is.

R rows    Q rows that asked    V vocabulary    K alternatives
"""

from collections.abc import Sequence

import torch

from triode.ids import TokenId
from triode.models.cuda.gpu import Gpu
from triode.models.step import TokenLogprobs

# Sorting keys are as large as the logits twice over.
_TILE_ROWS = 32


class PendingScores:
    """Logprobs on their way to the host. Made of raw logits, before anything changes them."""

    def __init__(self, logits_RV: torch.Tensor, rows: Sequence[int], num_alternatives: Sequence[int], gpu: Gpu) -> None:
        self._gpu = gpu
        self._rows = tuple(rows)
        self._num_alternatives = tuple(num_alternatives)
        self._row_Q = gpu.upload(torch.tensor(rows, dtype=torch.int32).numpy()).long()
        self._logprobs_QV = torch.log_softmax(logits_RV[self._row_Q], dim=-1)
        self._downloads: list[tuple[torch.Tensor, ...]] = []

    def finish(self, token_R: torch.Tensor) -> None:
        """The tokens are chosen: start to bring home their logprobs, ranks and alternatives."""
        # A row without a token is scored as token 0 and left out by the reader.
        token_Q1 = token_R[self._row_Q].long().clamp(min=0)[:, None]
        num = min(max(self._num_alternatives), self._logprobs_QV.shape[1])
        for tile_QV, token_T1 in zip(self._logprobs_QV.split(_TILE_ROWS), token_Q1.split(_TILE_ROWS), strict=True):
            logprob_T1 = tile_QV.gather(1, token_T1)
            rank_T = (tile_QV > logprob_T1).sum(-1) + 1
            top_TK = most_probable(tile_QV, num)
            parts = (token_T1[:, 0], logprob_T1[:, 0], rank_T, top_TK, tile_QV.gather(1, top_TK))
            self._downloads.append(tuple(self._gpu.download(part) for part in parts))
        del self._logprobs_QV

    def read(self) -> dict[int, TokenLogprobs]:
        """An entry for each row that asked; the step's last mark has been passed."""
        columns = [torch.cat(parts).tolist() for parts in zip(*self._downloads, strict=True)]
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

    By one integer key a token: topk takes any of equal values, and here no two are equal.
    """
    # Adding zero turns -0 into 0, whose bits compare as the value does.
    bits_RV = (logprobs_RV + 0.0).view(torch.int32)
    ordered_RV = torch.where(bits_RV < 0, bits_RV ^ 0x7FFFFFFF, bits_RV).long()
    vocab_size = logprobs_RV.shape[1]
    backwards_V = torch.arange(vocab_size - 1, -1, -1, device=logprobs_RV.device)
    top_RK = ((ordered_RV << 32) | backwards_V).topk(num, dim=-1).values
    return vocab_size - 1 - (top_RK & 0xFFFFFFFF)
