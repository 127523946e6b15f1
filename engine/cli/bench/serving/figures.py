"""From what was heard of each request to the row of a table."""

from collections.abc import Sequence
from statistics import fmean

import msgspec

from triode.engine.cli.bench.serving.load import Load


class Heard(msgspec.Struct, kw_only=True):
    """One request, as its client saw it. Times are seconds from the run's start."""

    due_at_s: float
    first_at_s: float | None = None
    """When its first text came."""
    last_at_s: float = 0.0
    prompt_tokens: int = 0
    output_tokens: int = 0
    failure: str | None = None

    @property
    def ttft_ms(self) -> float:
        """To the first text, waits before sending included."""
        return ((self.first_at_s or self.last_at_s) - self.due_at_s) * 1e3

    @property
    def e2e_ms(self) -> float:
        """To the end."""
        return (self.last_at_s - self.due_at_s) * 1e3

    @property
    def tpot_ms(self) -> float | None:
        """Between a token and the next one, after the first."""
        if self.output_tokens < 2 or self.first_at_s is None:
            return None
        return (self.last_at_s - self.first_at_s) / (self.output_tokens - 1) * 1e3


class Spread(msgspec.Struct, frozen=True):
    """Of one time, over all requests of a run."""

    mean: float
    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread | None":
        """None where there is nothing."""
        if not values:
            return None
        ordered = sorted(values)
        return cls(fmean(ordered), *(percentile(ordered, share) for share in (0.5, 0.9, 0.99)))


class Goal(msgspec.Struct, frozen=True):
    """What a request must keep to be of use to whoever waits."""

    ttft_ms: float | None = None
    tpot_ms: float | None = None

    def is_met(self, heard: Heard) -> bool:
        """Whether it was answered, and in time."""
        return (
            heard.failure is None
            and (self.ttft_ms is None or heard.ttft_ms <= self.ttft_ms)
            and (self.tpot_ms is None or (heard.tpot_ms or 0.0) <= self.tpot_ms)
        )


class ServingRow(msgspec.Struct, frozen=True, kw_only=True):
    """One run."""

    test: str = "serve"
    model: str
    rate: float | None
    concurrency: int | None
    requests: int
    failed: int
    duration_s: float
    prompt_tokens: int
    output_tokens: int
    req_s: float
    out_tok_s: float
    total_tok_s: float
    goodput_req_s: float | None
    """Requests a second that met the goal, if one was given."""
    ttft_ms: Spread | None
    tpot_ms: Spread | None
    e2e_ms: Spread | None


def row(model: str, load: Load, all_heard: Sequence[Heard], goal: Goal | None) -> ServingRow:
    """A run in figures. Only requests that were answered have times."""
    answered = [heard for heard in all_heard if heard.failure is None]
    duration_s = max((heard.last_at_s for heard in all_heard), default=0.0) or 1e-9
    num_in, num_out = (sum(getattr(h, name) for h in answered) for name in ("prompt_tokens", "output_tokens"))
    return ServingRow(
        model=model,
        rate=load.rate,
        concurrency=load.concurrency,
        requests=len(all_heard),
        failed=len(all_heard) - len(answered),
        duration_s=duration_s,
        prompt_tokens=num_in,
        output_tokens=num_out,
        req_s=len(answered) / duration_s,
        out_tok_s=num_out / duration_s,
        total_tok_s=(num_in + num_out) / duration_s,
        goodput_req_s=None if goal is None else sum(map(goal.is_met, all_heard)) / duration_s,
        ttft_ms=Spread.of([heard.ttft_ms for heard in answered]),
        tpot_ms=Spread.of([tpot for heard in answered if (tpot := heard.tpot_ms) is not None]),
        e2e_ms=Spread.of([heard.e2e_ms for heard in answered]),
    )


def percentile(ordered: Sequence[float], share: float) -> float:
    """Between the two nearest values, in proportion."""
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)
