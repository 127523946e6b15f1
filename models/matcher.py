"""Matchers and the masks of what may come next, within a budget of work.

A mask costs 20 to 300 microseconds where the guide is well meant. What its author wants to be costly is bounded three
times, because neighbours in the batch wait for it:

* Each mask has its fuel: steps of the lexer, states of its automaton, items of the parser (`LIMITS`). Fuel is counted,
  not timed: how busy the machine is does not matter.
* What the fuel does not measure well is measured by the clock. Where a step's masks together took too long, the next
  step times its matchers one by one; one that is over `MAX_MASK_S` fails, and of those that are together over
  `MAX_FILL_S` the costliest fail, until the others are within it.
* Tokens without a choice are followed so many at a time (`MAX_FORCED_TOKENS`).

A sequence that fails says why; the others get their masks in the same step. Sequences with the same guide share a lexer, of
which one may make so much that it is of no more use to any of them. So a matcher whose lexer gives up begins again with
another one, and fails if that gives up, too, over its own tokens alone. This has a budget a step (`MAX_RENEWING_S`), beyond
which those fail that have not begun again.

    G matchers        W 32-bit words of a mask, one bit a token
"""

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property

import numpy as np
import numpy.typing as npt
from llguidance import LLExecutor, LLMatcher, LLParserLimits

from triode.ids import TokenId
from triode.kernels.native.cpus import usable_threads

MaskWords = npt.NDArray[np.int32]


def _limits(max_items_in_row: int) -> LLParserLimits:
    return LLParserLimits(
        initial_lexer_fuel=500_000,
        step_lexer_fuel=50_000,
        max_items_in_row=max_items_in_row,
        step_max_items=5_000,
        max_lexer_states=20_000,
        verbose_errors=False,
    )


LIMITS = _limits(1_000)
"""About 10 ms to build the lexer, 3 ms for the costliest mask known, and 40 MB a lexer. Optional properties of an object
take four items in a row each (`MAX_OPTIONAL` of `triode.models.guide`), a list of 2,000 words half of the lexer's fuel."""
GRAMMAR_LIMITS = _limits(200)
"""Of a grammar in the caller's own words: nothing else can be so ambiguous that items combine with items."""

MAX_MASK_S = 0.02
"""Processor time of one matcher in one step, after which its sequence fails."""
MAX_TOKEN_S = 2e-5
"""Added for each token that is read beyond the first, as after a preemption: these take a microsecond or two."""
MAX_FILL_S = 0.01
"""What a step's masks may take together, spread over the cores that this process may use."""
MAX_RENEWING_S = 0.005
"""What beginning again may take of a step; it is not begun when so much has been spent."""
CHEAP_MASK_S = 0.002
"""Whose mask takes no longer is not to blame, however many they are."""

MAX_FORCED_TOKENS = 64
"""Forced tokens of one step; those behind them follow the next token that is sampled."""
MAX_FORCED_BYTES = 4096
"""Of a longer text without a choice the tokens come one by one: all of it is encoded to find the first of them."""

MASK_THREADS = max(1, min(8, usable_threads(os.cpu_count() or 1) * 4 // 5))
"""Threads that make masks together. A mask takes some 40 microseconds, and waking a thread hardly less: more than eight gain
nothing for 64 rows."""

_LEXER_GAVE_UP = "lexer error"
"""How llguidance begins its reason then."""
_MAX_READ_TOKENS = 256
"""Read at once where time is taken; the clock is looked at in between."""


class Matcher:
    """How far one sequence has come in its guide."""

    def __init__(
        self, inner: LLMatcher, masks: "MaskMaker", renewals: "Sequence[Callable[[Matcher], LLMatcher]]" = ()
    ) -> None:
        """`renewals` are where to get another lexer from when this one has given up, one after the other. They are given
        the matcher."""
        self.lexer = 0
        """The same number for those that share one."""
        self.inner = inner
        self.masks = masks
        """Who makes its masks."""
        self.error: str | None = None
        """Why the guide cannot be followed any more; the sequence fails with it."""
        self.is_suspect = False
        """Whether its masks may be what others have waited for: the next one is timed."""
        self._renewals = [*renewals]
        self.renewing_s = 0.0
        """Processor time of beginning again, which nobody is charged for: it was another's lexer, or it is the last time."""
        self._read: list[TokenId] = []
        self._unread: list[TokenId] = []

    def append(self, token_id: TokenId) -> None:
        """The sequence goes on with a token that the mask allowed. It is read when the next mask is asked for."""
        self._unread.append(token_id)

    @property
    def num_unread(self) -> int:
        """Tokens appended since the last mask."""
        return len(self._unread)

    def take_unread(self) -> list[TokenId]:
        """Tokens appended since the last call. Past the end of the output nothing is read."""
        unread, self._unread = self._unread, []
        if self.error is not None or (self.inner.is_stopped() and not self.inner.is_error()):
            return []
        self._read += unread
        return unread

    def force(self, max_tokens: int) -> list[TokenId]:
        """The next tokens, where the guide leaves no choice: as many as are certain, at most `max_tokens`. They are read.

        At the end of the output that is the end-of-sequence token.
        """
        start_s = time.thread_time() - self.renewing_s
        forced = self._force(min(max_tokens, MAX_FORCED_TOKENS))
        self.charge(time.thread_time() - self.renewing_s - start_s, MAX_MASK_S)
        return [] if self.error is not None else forced

    def _force(self, max_tokens: int) -> list[TokenId]:
        self.check()
        unread = self.take_unread()
        if unread and not self.inner.consume_tokens([*unread]):
            self.check()
        if self.error is not None:
            return []
        if self.inner.is_stopped():
            return [self.masks.eos_token_id][:max_tokens]
        # What it takes to find none counts: at most places there are none.
        if not 0 < len(self.inner.compute_ff_bytes()) <= MAX_FORCED_BYTES:
            return []
        forced = [TokenId(token_id) for token_id in self.inner.compute_ff_tokens()[:max_tokens]]
        self._read += forced
        if forced and not self.inner.consume_tokens([*forced]):
            self.check()
        return forced

    def check(self) -> bool:
        """Notice that llguidance has given up. Returns whether it has begun again, and needs another mask."""
        if self.error is not None or not self.inner.is_error():
            return False
        while self._renewals and reason_of(self.inner).startswith(_LEXER_GAVE_UP) and self.masks.may_renew:
            start_s = time.thread_time()
            self.inner = self._renewals.pop(0)(self)
            self.inner.consume_tokens([*self._read])
            took_s = time.thread_time() - start_s
            self.renewing_s += took_s
            self.masks.renewed(took_s)
            if not self.inner.is_error():
                return True
        self.error = f"the guide cannot be followed any further: {reason_of(self.inner)}"
        return False

    def charge(self, took_s: float, allowed_s: float) -> None:
        """Fail if finding what may come next took too much processor time."""
        if self.error is None and took_s > allowed_s:
            self.error = f"the guide is too ambiguous: finding what may come next took {took_s * 1e3:.0f} ms"


class MaskMaker:
    """Makes masks, in parallel and without the interpreter's lock."""

    def __init__(self, num_words: int, eos_token_id: TokenId) -> None:
        self.num_words = num_words
        """W."""
        self.eos_token_id = eos_token_id
        """What an output ends with."""
        self._num_cores = usable_threads(os.cpu_count() or 1)
        self._renewing_s = 0.0

    def fill(self, matchers: Sequence[Matcher | None], mask_GW: MaskWords) -> None:
        """Each matcher's mask of what may come next. Nothing may where a matcher has an error, which this may bring.

        Where there is none the mask is left as it is.
        """
        assert mask_GW.flags.c_contiguous, "llguidance writes to the array's memory"
        self._renewing_s = 0.0
        trusted: list[tuple[int, Matcher]] = []
        suspects: list[tuple[int, Matcher]] = []
        for row, matcher in enumerate(matchers):
            if matcher is None or matcher.error is not None:
                continue
            (suspects if matcher.is_suspect or matcher.num_unread > _MAX_READ_TOKENS else trusted).append(
                (row, matcher)
            )
        if trusted:
            start_s = time.perf_counter()
            # A thread gets neighbours. Those that share a lexer share a lock, for which threads would wait for each other.
            suspects += self._fill_together(sorted(trusted, key=_lexer_of), mask_GW)
            if time.perf_counter() - start_s > MAX_FILL_S:
                for _, matcher in trusted:
                    matcher.is_suspect = True
        if suspects:
            self._fill_suspects([matcher for _, matcher in suspects], [mask_GW[row] for row, _ in suspects])
        for row, matcher in enumerate(matchers):
            if matcher is not None and matcher.error is not None:
                mask_GW[row] = 0

    def in_thread(self, fill: Callable[[], None]) -> "Future[None]":
        """Have it done in the thread that makes masks."""
        return self._thread.submit(fill)

    def close(self) -> None:
        """End the threads. Idempotent; others begin when masks are asked for again."""
        for name in ("_thread", "_timed_threads"):
            threads: ThreadPoolExecutor | None = self.__dict__.pop(name, None)
            if threads is not None:
                threads.shutdown()

    @property
    def may_renew(self) -> bool:
        """Whether the step's budget leaves room for another lexer."""
        return self._renewing_s < MAX_RENEWING_S

    def renewed(self, took_s: float) -> None:
        """A matcher has begun again."""
        self._renewing_s += took_s

    def _fill_together(self, rows: Sequence[tuple[int, Matcher]], mask_GW: MaskWords) -> list[tuple[int, Matcher]]:
        """Returns the rows that have begun again, and have no mask yet."""
        unread = [(matcher, token_ids) for _, matcher in rows if (token_ids := matcher.take_unread())]
        if unread:
            self._executor.consume_token_par([(matcher.inner, token_ids[0]) for matcher, token_ids in unread])
        for matcher, token_ids in unread:
            if len(token_ids) > 1:
                matcher.inner.consume_tokens([*token_ids[1:]])
        inner = [(matcher.inner, row) for row, matcher in rows]
        self._executor.unsafe_compute_mask_ptr(inner, mask_GW.ctypes.data, mask_GW[0].nbytes, len(mask_GW))
        return [(row, matcher) for row, matcher in rows if matcher.check()]

    def _fill_suspects(self, matchers: Sequence[Matcher], masks: Sequence[MaskWords]) -> None:
        took_s = list(self._timed_threads.map(_fill_timed, matchers, masks))
        for matcher, each_s in zip(matchers, took_s, strict=True):
            matcher.is_suspect = each_s > CHEAP_MASK_S
        for row in costliest(took_s, MAX_FILL_S * self._num_cores):
            matchers[row].charge(took_s[row], CHEAP_MASK_S)

    @cached_property
    def _thread(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(1, thread_name_prefix="triode-masks")

    @cached_property
    def _timed_threads(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(self._num_cores, thread_name_prefix="triode-suspects")

    @cached_property
    def _executor(self) -> LLExecutor:
        return LLExecutor(num_threads=MASK_THREADS)


def _lexer_of(row: tuple[int, Matcher]) -> int:
    return row[1].lexer


def costliest(took_s: Sequence[float], budget_s: float) -> list[int]:
    """The fewest rows without which the others are within a budget together."""
    over_s = sum(took_s) - budget_s
    rows: list[int] = []
    for row in sorted(range(len(took_s)), key=lambda row: -took_s[row]):
        if over_s <= 0:
            break
        rows.append(row)
        over_s -= took_s[row]
    return rows


def _fill_timed(matcher: Matcher, mask_W: MaskWords) -> float:
    """One mask. Returns this thread's own time in it, which does not depend on how busy the machine is."""
    start_s = time.thread_time() - matcher.renewing_s
    token_ids = matcher.take_unread()
    allowed_s = MAX_MASK_S + MAX_TOKEN_S * len(token_ids)
    for start in range(0, len(token_ids), _MAX_READ_TOKENS):
        matcher.inner.consume_tokens([*token_ids[start : start + _MAX_READ_TOKENS]])
        if time.thread_time() - start_s > allowed_s:
            break
    else:
        matcher.inner.unsafe_compute_mask_ptr(mask_W.ctypes.data, mask_W.nbytes)
    while matcher.check():
        matcher.inner.unsafe_compute_mask_ptr(mask_W.ctypes.data, mask_W.nbytes)
    took_s = time.thread_time() - matcher.renewing_s - start_s
    matcher.charge(took_s, allowed_s)
    # What reading takes is not what the next masks will.
    return took_s if len(token_ids) <= 1 else 0.0


def reason_of(matcher: LLMatcher) -> str:
    """The first lines of what llguidance says; a picture of its state follows."""
    return matcher.get_error().partition("<non-verbose/>")[0].strip()
