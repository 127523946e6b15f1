"""Which tokens a sequence contains, and how often its output does: what the penalties look at.

A list of the distinct tokens, not a row of the vocabulary: the penalties then touch as many logits as the sequence has
tokens, instead of all of them.
"""

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.integer]


class TokenCounts:
    """The distinct tokens of a sequence, each beside the number of times that the output contains it."""

    def __init__(self, tokens: IntArray, num_prompt_tokens: int) -> None:
        distinct, first_index = np.unique(tokens, return_index=True)
        distinct = distinct[np.argsort(first_index)]
        self._index = {token_id: index for index, token_id in enumerate(distinct.tolist())}
        self._num_distinct = len(distinct)
        # Room to grow in; doubled when it is used up.
        self._token_ids = np.zeros(max(64, 2 * self._num_distinct), np.int64)
        self._token_ids[: self._num_distinct] = distinct
        self._output_counts = np.zeros_like(self._token_ids)
        for token_id in tokens[num_prompt_tokens:].tolist():
            self._output_counts[self._index[token_id]] += 1

    @property
    def token_ids(self) -> IntArray:
        """Each token of prompt and output once, in order of first appearance; a view."""
        return self._token_ids[: self._num_distinct]

    @property
    def output_counts(self) -> IntArray:
        """Parallel to `token_ids`: 0 for a token of the prompt alone; a view."""
        return self._output_counts[: self._num_distinct]

    def add(self, token_id: int) -> None:
        """The output has one more token."""
        index = self._index.setdefault(token_id, self._num_distinct)
        if index == self._num_distinct:
            self._grow()
            self._token_ids[index] = token_id
            self._num_distinct += 1
        self._output_counts[index] += 1

    def _grow(self) -> None:
        if self._num_distinct == len(self._token_ids):
            self._token_ids = np.concatenate([self._token_ids, np.zeros_like(self._token_ids)])
            self._output_counts = np.concatenate([self._output_counts, np.zeros_like(self._output_counts)])
