"""A launched step: what it will say, and how that is read once the device has passed its last mark."""

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field

import torch

from triode.ids import TokenId
from triode.kernels.sample.gpu import NOT_FINITE as NOT_FINITE_TOKEN
from triode.models.cuda.gpu import Mark
from triode.models.cuda.scores import PendingScores
from triode.models.sampler import ALL_FORBIDDEN, NOT_FINITE
from triode.models.slots import SlotState
from triode.models.step import RowError, StepPlan, StepResult, TokenLogprobs


@dataclass(slots=True, eq=False)
class Flight:
    """One step between launch and collect."""

    plan: StepPlan
    begun: Mark
    computed: Mark
    """Behind the logits."""
    ended: Mark
    sampled: Sequence[int]
    """The plan's rows that sample, in the order of `token_R`."""
    token_R: torch.Tensor | None
    """In host memory: tokens, or why there is none."""
    scores: PendingScores | None = None
    prompt_logprobs: tuple[tuple[TokenLogprobs, ...], ...] | None = None
    embeddings: tuple[tuple[float, ...], ...] | None = None
    refusals: Mapping[int, RowError] = field(default_factory=dict)
    """By index in `token_R`, why a row cannot follow its guide any further."""
    learners: list[tuple[int, int, SlotState]] = field(default_factory=list)
    """(index in `token_R`, slot, state) of the rows with guides, whose host copy must learn their token."""
    overtaken: Set[int] = frozenset()
    """Indices in `token_R` of rows that were planned before their forced tokens were known: they bring none."""
    forced: dict[int, list[TokenId]] = field(default_factory=dict)
    """By index in `token_R`, what a guide forces behind the token; there when the learners have learned."""
    _tokens: list[int] | None = None

    @property
    def may_force(self) -> bool:
        """Whether the learners must learn before the result is read."""
        return bool(self.learners)

    def tokens(self) -> list[int]:
        """What the sampling rows got. Waits for the device. Asked by the thread that launches, before or after the
        result is taken, because only that thread lends the host memory to another step, or before it by the one that
        collects."""
        if self._tokens is not None:
            return self._tokens
        self.ended.wait()
        tokens: list[int] = [] if self.token_R is None else self.token_R[: len(self.sampled)].tolist()
        return tokens

    def result(self) -> StepResult:
        """Everything, once. Waits for the device."""
        self._tokens = self.tokens()
        result = self._result(self._tokens)
        self.ended.release()
        return result

    def _result(self, tokens: list[int]) -> StepResult:
        plan = self.plan
        forward_s = self.computed.seconds_since(self.begun)
        sample_s = self.ended.seconds_since(self.computed)
        logprobs, errors = self._logprobs(tokens), self._errors(tokens)
        is_plain = errors is None and logprobs is None and not self.forced and not self.overtaken
        if is_plain and len(tokens) == len(plan.slots):
            # Every row of a steady decode step: its rows are in plan order.
            num_accepted: Sequence[int] = (1,) * len(tokens)
            token_ids = tuple(map(TokenId, tokens)) if self._in_order() else self._ordered(tokens)
        else:
            counts = [0] * len(plan.slots)
            for index, row in enumerate(self.sampled):
                counts[row] = len(self._accepted(index, tokens[index]))
            num_accepted = tuple(counts)
            token_ids = self._ordered(tokens)
        return StepResult(
            step_id=plan.step_id,
            slots=plan.slots,
            epochs=plan.epochs,
            num_accepted=tuple(num_accepted),
            token_ids=token_ids,
            logprobs=logprobs,
            errors=errors,
            prompt_logprobs=self.prompt_logprobs,
            embeddings=self.embeddings,
            forward_s=forward_s,
            sample_s=sample_s,
        )

    def _in_order(self) -> bool:
        return self.sampled == range(len(self.plan.slots))

    def _by_row(self, tokens: list[int]) -> list[tuple[int, int, int]]:
        """(row, index, token) in plan order."""
        indices = sorted(range(len(tokens)), key=lambda index: self.sampled[index])
        return [(self.sampled[index], index, tokens[index]) for index in indices]

    def _ordered(self, tokens: list[int]) -> tuple[TokenId, ...]:
        return tuple(each for _, index, token in self._by_row(tokens) for each in self._accepted(index, token))

    def _accepted(self, index: int, token: int) -> Sequence[TokenId]:
        if token < 0 or index in self.overtaken:
            return ()
        return (TokenId(token), *self.forced.get(index, ()))

    def _logprobs(self, tokens: list[int]) -> tuple[TokenLogprobs | None, ...] | None:
        if self.scores is None:
            return None
        entries = self.scores.read()
        return tuple(
            entry
            for _, index, token in self._by_row(tokens)
            # Of a forced token nobody knows it: rows that ask for logprobs have none.
            for entry in [entries.get(index), *[None] * len(self.forced.get(index, ()))][
                : len(self._accepted(index, token))
            ]
        )

    def _errors(self, tokens: list[int]) -> tuple[RowError | None, ...] | None:
        if not tokens or min(tokens) >= 0:
            return None
        errors: list[RowError | None] = [None] * len(self.plan.slots)
        for index, (row, token) in enumerate(zip(self.sampled, tokens, strict=True)):
            if token < 0 and index not in self.overtaken:
                errors[row] = NOT_FINITE if token == NOT_FINITE_TOKEN else self.refusals.get(index, ALL_FORBIDDEN)
        return tuple(errors) if any(errors) else None
