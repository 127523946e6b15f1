"""Transcripts: what each sample of a request has said, token by token.

The detokenizer writes at the end, and the request's caller reads on from where it was, perhaps in another thread. Nothing is
handed over, copied or dropped between the two: who is behind finds all that has come in one piece, who wants the whole reads
it once, and what has not been read takes no more room than what has.
"""

from triode.actors.messages import Delta, FinishReason
from triode.ids import TokenId
from triode.models.step import TokenLogprobs


class Transcript:
    """The output of one sample. Has one writer and one reader; what has been written stays as it is.

    Whoever sees a token sees what was written before it: its text, its logprobs, and that it is the last one if it is.
    """

    __slots__ = ("finish_reason", "logprobs", "num_final_tokens", "stop_reason", "texts", "token_ids")

    def __init__(self) -> None:
        self.texts: list[str] = []
        """Text that is safe to show; joined, it lags behind the tokens by what is held back."""
        self.token_ids: list[TokenId] = []
        self.logprobs: list[TokenLogprobs] = []
        """Parallel to `token_ids` if the request asked for logprobs, else empty."""
        self.finish_reason: FinishReason | None = None
        self.stop_reason: str | int | None = None
        self.num_final_tokens: int | None = None
        """How many tokens there will have been; unknown until the last ones are written."""

    def add(self, text: str, token_id: TokenId, logprob: TokenLogprobs | None) -> None:
        """Write a token that is not the last one."""
        self.texts.append(text)
        if logprob is not None:
            self.logprobs.append(logprob)
        self.token_ids.append(token_id)

    def add_delta(self, delta: Delta) -> None:
        """Write several tokens, or the last ones."""
        if delta.finish_reason is not None:
            self.stop_reason, self.finish_reason = delta.stop_reason, delta.finish_reason
            self.num_final_tokens = len(self.token_ids) + len(delta.token_ids)
        self.texts.append(delta.text)
        self.logprobs.extend(delta.logprobs or ())
        self.token_ids.extend(delta.token_ids)
