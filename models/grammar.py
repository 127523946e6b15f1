"""GuideCompiler: guides compiled for one tokenizer.

llguidance turns a guide into an automaton over bytes, and walks the vocabulary's trie with it (`triode.models.matcher`). The
compiler keeps prototypes of each guide that it has compiled; a sequence gets a copy of one.

What a caller may send is hostile. The text is bounded (`triode.models.guide`), and so is what becomes of it: compiling
has a budget of work and of automaton states, beyond which a guide is refused. Prototypes are kept by the length of their
text, because memory follows it: those of unfinished requests in any case, so that a step never waits for a compiler,
and of the others the last used.

All copies of a prototype share one lexer, and a lock with it: their masks are made one after the other. So a guide that many
sequences have at a time gets more prototypes, which are made in a thread of their own, and each sequence a copy of the one that
the fewest have.

The states of a lexer are made as outputs need them, and stay for the outputs that follow. Where it has made as many as it may,
or one copy's fuel ran out within it, it is of no more use to any of them. They then begin again with copies of another prototype,
and once more with a lexer of their own each, so that a request fails by its own tokens only. That is done within a step, which
has a budget for it; whoever is beyond that fails, too. So few sequences have a prototype at a time (`MAX_SHARERS`), and none is
given to new ones for ever (`MAX_GIVEN`): what a well-meant guide makes of a lexer is a few hundred states of 20,000. Checking
guides brings enough prototypes for those who may come. Where sequences that have ended still count, because nothing has taken
their places in the batch, a step may have to wait for one more.
"""

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import count
from weakref import WeakSet

from llguidance import LLMatcher, LLTokenizer

from triode.errors import EngineBusy
from triode.ids import TokenId
from triode.models.grammar_text import grammar_text
from triode.models.guide import Grammar, Guide, JsonObject
from triode.models.matcher import GRAMMAR_LIMITS, LIMITS, MASK_THREADS, MaskMaker, Matcher, reason_of
from triode.models.tokenizer import Tokenizer
from triode.models.vocabulary import vocabulary_for

MAX_KEPT_BYTES = 2**21
"""Text of the guides that stay compiled: a compiled one takes up to about 200 times as much."""

MAX_UNHELD = 64
"""Guides that stay compiled although no request has them: what their lexers have grown to stays with them."""

MAX_SHARERS = 16
"""Sequences that have a prototype at a time: so many may fail by what one of them makes of it. Making another takes a
millisecond, in the thread that checks guides."""

FEW_SHARERS = 4
"""Where more of them come to one prototype, the guide gets another in the background."""

MAX_GIVEN = 256
"""Sequences that a prototype is given to, one time or another."""

MAX_LEXERS = 2 * MASK_THREADS if MASK_THREADS > 1 else 1
"""Prototypes up to which a guide grows in the background. With as many as threads, those that end first would wait for the
locks of the others."""

MAX_SPARE = 64
"""Prototypes that are kept beside those that requests need (`MAX_SHARERS`) and the first of each guide, all guides together:
a grown one takes up to 40 MB."""


@dataclass(slots=True, eq=False)
class _Prototype:
    matcher: LLMatcher
    num_given: int = 0
    sharers: "WeakSet[Matcher]" = field(default_factory=WeakSet)
    """The sequences that have it now; one that has ended counts until its place in the batch is taken, or nobody has the
    guide."""
    number: int = field(default_factory=count().__next__)

    @property
    def is_spent(self) -> bool:
        """Whether enough sequences have had it, or its lexer has given up."""
        if self.num_given >= MAX_GIVEN:
            return True
        copy = self.matcher.deep_copy()
        copy.compute_bitmask()
        return copy.is_error()

    def share(self, matcher: Matcher) -> None:
        """One more sequence has it."""
        matcher.lexer = self.number
        self.sharers.add(matcher)
        self.num_given += 1


@dataclass(slots=True)
class _Compiled:
    prototypes: list[_Prototype]
    num_bytes: int
    """Of the grammar's text."""
    num_holders: int = 0
    """Unfinished requests that have the guide, or may have it."""
    growing: "Future[None] | None" = None
    """How it gets more prototypes in the background."""

    @property
    def next_one(self) -> _Prototype:
        """The one that the fewest have is copied first."""
        return min(self.prototypes, key=_num_sharers)

    @property
    def num_needed(self) -> int:
        """Prototypes without which some would have too many sharers."""
        return max(1, -(-self.num_holders // MAX_SHARERS))

    @property
    def is_short(self) -> bool:
        """Whether there is none for the next sequence, or may be none for one of those that hold the guide."""
        return len(self.prototypes) < self.num_needed or _num_sharers(self.next_one) >= MAX_SHARERS

    @property
    def is_crowded(self) -> bool:
        """Whether sequences would wait for each other less if there were another."""
        num_prototypes = len(self.prototypes)
        return num_prototypes < MAX_LEXERS and sum(map(_num_sharers, self.prototypes)) > FEW_SHARERS * num_prototypes

    def drop(self, spent: _Prototype) -> None:
        """Give it to nobody any more."""
        if spent in self.prototypes:
            self.prototypes.remove(spent)


def _num_sharers(prototype: _Prototype) -> int:
    return len(prototype.sharers)


class GuideCompiler:
    """Compiles guides. Methods may be called from any thread."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        """`vocab_size` is the model's: a mask has no other tokens."""
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_token_ids = tuple(token_id for token_id in eos_token_ids if token_id < vocab_size)
        self._lock = threading.Lock()
        self._compiled: OrderedDict[Guide, _Compiled] = OrderedDict()
        self._kept_bytes = 0
        self._held_bytes = 0
        self._is_closing = threading.Event()

    @cached_property
    def masks(self) -> MaskMaker:
        """Who makes the matchers' masks: of words enough for the model's tokens and the tokenizer's."""
        num_words = -(-max(self._vocab_size, self._tokenizer.vocab_size) // 32)
        return MaskMaker(num_words, TokenId(self._eos_token_ids[0]))

    def warm(self) -> None:
        """Do at once what the first guide would wait for. A model that can have no guide needs nothing."""
        if self._eos_token_ids:
            self._find(JsonObject())

    def check(self, guide: Guide, num_requests: int = 1) -> None:
        """Compile a guide, unless it is compiled already, and keep it until `release` for so many requests.

        Raises:
            ValueError: with the reason why it cannot be followed.
            EngineBusy: if those of other requests leave no room for it.
        """
        compiled = self._find(guide)
        with self._lock:
            compiled = self._keep(guide, compiled)
            if compiled.num_holders == 0:
                if self._held_bytes + compiled.num_bytes > MAX_KEPT_BYTES:
                    raise EngineBusy(
                        f"guides of unfinished requests must have <= {MAX_KEPT_BYTES} bytes together; try again later"
                    )
                self._held_bytes += compiled.num_bytes
            compiled.num_holders += num_requests
        try:
            self._provide(guide, compiled)
        except BaseException:
            self.release(guide, num_requests)
            raise

    def release(self, guide: Guide, num_requests: int = 1) -> None:
        """Requests whose guide was checked have ended. Nobody may ask for their matchers any more."""
        with self._lock:
            compiled = self._compiled[guide]
            assert compiled.num_holders >= num_requests, "a guide is released as often as it was checked"
            compiled.num_holders -= num_requests
            if compiled.num_holders == 0:
                self._held_bytes -= compiled.num_bytes
                # Their places in the batch may long be nobody's, and matchers stay with them.
                for prototype in compiled.prototypes:
                    prototype.sharers.clear()
                self._evict()

    def matcher(self, guide: Guide, token_ids: Sequence[TokenId]) -> Matcher:
        """A matcher for a sequence that has generated `token_ids` so far. At once, if the guide was checked.

        Raises:
            RuntimeError: if growing in the background has raised an exception. It was compiled before, so that is no fault
                of the guide's; here it ends the engine, where `check` would tell a caller who has nothing to do with it.
        """
        compiled = self._find(guide)
        with self._lock:
            _raise_what_growing_raised(compiled)
        renewals = (
            lambda matcher: self._copy_of_another(guide, matcher),
            lambda matcher: self._copy_of_its_own(guide, matcher),
        )
        with self._with_room(guide, compiled) as prototype:
            matcher = Matcher(prototype.matcher.deep_copy(), self.masks, renewals)
            prototype.share(matcher)
            if compiled.is_crowded and compiled.growing is None:
                compiled.growing = self._growing.submit(self._grow, guide, compiled)
        for token_id in token_ids:
            matcher.append(token_id)
        return matcher

    def _copy_of_another(self, guide: Guide, matcher: Matcher) -> LLMatcher:
        """Whose lexer is not that which has given up."""
        compiled = self._find(guide)
        self._drop_that_of(matcher, compiled)
        self._provide(guide, compiled)
        with self._with_room(guide, compiled) as prototype:
            prototype.share(matcher)
        return prototype.matcher.deep_copy()

    def _copy_of_its_own(self, guide: Guide, matcher: Matcher) -> LLMatcher:
        self._drop_that_of(matcher, self._find(guide))
        own = _compile(guide, self._vocabulary)
        matcher.lexer = own.number
        return own.matcher

    def _drop_that_of(self, matcher: Matcher, compiled: _Compiled) -> None:
        with self._lock:
            compiled.prototypes = [prototype for prototype in compiled.prototypes if matcher not in prototype.sharers]

    def _provide(self, guide: Guide, compiled: _Compiled) -> None:
        """As many prototypes as holders need, of which the next one is of use."""
        while True:
            with self._with_room(guide, compiled) as prototype:
                pass
            # Beside the lock: this waits for the masks that are being made of it.
            if not prototype.is_spent:
                return
            with self._lock:
                compiled.drop(prototype)

    @contextmanager
    def _with_room(self, guide: Guide, compiled: _Compiled) -> Iterator[_Prototype]:
        """The prototype for the next sequence, under the lock. Compiles those that are missing."""
        while True:
            with self._lock:
                if not compiled.is_short:
                    yield compiled.next_one
                    return
            fresh = _compile(guide, self._vocabulary)
            with self._lock:
                self._add(guide, compiled, fresh)

    def _grow(self, guide: Guide, compiled: _Compiled) -> None:
        """As many prototypes as those who have the guide now would use; the next ones get them."""
        for _ in range(MAX_LEXERS):
            fresh = _compile(guide, self._vocabulary)
            with self._lock:
                self._add(guide, compiled, fresh)
                if self._is_closing.is_set() or not compiled.is_crowded:
                    return

    def _add(self, guide: Guide, compiled: _Compiled, fresh: _Prototype) -> None:
        compiled.prototypes.append(fresh)
        if guide in self._compiled:
            # Spare ones of others go first.
            self._compiled.move_to_end(guide)
        self._evict_spares()

    def _find(self, guide: Guide) -> _Compiled:
        with self._lock:
            if (compiled := self._compiled.get(guide)) is not None:
                self._compiled.move_to_end(guide)
                return compiled
            vocabulary = self._vocabulary
        compiled = _Compiled([_compile(guide, vocabulary)], len(grammar_text(guide).encode()))
        with self._lock:
            return self._keep(guide, compiled)

    def _keep(self, guide: Guide, compiled: _Compiled) -> _Compiled:
        # Another thread may have compiled it first, or it was evicted meanwhile.
        if guide not in self._compiled:
            self._compiled[guide] = compiled
            self._kept_bytes += compiled.num_bytes
            self._evict()
        return self._compiled.get(guide, compiled)

    def _evict(self) -> None:
        unheld = [guide for guide, compiled in self._compiled.items() if not compiled.num_holders]
        for index, guide in enumerate(unheld):
            if self._kept_bytes <= MAX_KEPT_BYTES and len(unheld) - index <= MAX_UNHELD:
                return
            self._kept_bytes -= self._compiled.pop(guide).num_bytes

    def _evict_spares(self) -> None:
        num_spare = {
            guide: len(compiled.prototypes) - compiled.num_needed for guide, compiled in self._compiled.items()
        }
        num_over = sum(num for num in num_spare.values() if num > 0) - MAX_SPARE
        for guide, num in num_spare.items():
            for _ in range(min(num, num_over)):
                prototypes = self._compiled[guide].prototypes
                # The room that there is stays, and of those that nobody has the ones that have grown.
                prototypes.remove(max(reversed(prototypes), key=_num_sharers))
                num_over -= 1

    def close(self) -> None:
        """End the threads. Idempotent; others begin when they are needed again."""
        growing: ThreadPoolExecutor | None = self.__dict__.pop("_growing", None)
        if growing is not None:
            self._is_closing.set()
            growing.shutdown(cancel_futures=True)
            self._is_closing.clear()
        if (masks := self.__dict__.get("masks")) is not None:
            masks.close()

    @cached_property
    def _growing(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(1, thread_name_prefix="triode-lexers")

    @cached_property
    def _vocabulary(self) -> LLTokenizer:
        # Made on first use, because it takes the better part of a second.
        if not self._eos_token_ids:
            raise ValueError("guide must be None: this model has no end-of-sequence token to end an output with")
        return vocabulary_for(self._tokenizer, self._vocab_size, self._eos_token_ids)


def _compile(guide: Guide, vocabulary: LLTokenizer) -> _Prototype:
    try:
        grammar = grammar_text(guide)
    except ValueError as error:
        raise ValueError(f"guide cannot be compiled: {error}") from error
    is_anything = isinstance(guide, Grammar) and not guide.of_schemas
    prototype = LLMatcher(vocabulary, grammar, log_level=0, limits=GRAMMAR_LIMITS if is_anything else LIMITS)
    # The first mask builds most of what later ones need, and shows a guide that is too complex from the start.
    if not prototype.is_error():
        prototype.compute_bitmask()
    if prototype.is_error():
        raise ValueError(f"guide cannot be compiled: {reason_of(prototype)}")
    return _Prototype(prototype)


def _raise_what_growing_raised(compiled: _Compiled) -> None:
    """One that has not ended goes on; one that `close` has cancelled is as if it had never been."""
    if compiled.growing is None or not compiled.growing.done():
        return
    ended, compiled.growing = compiled.growing, None
    if not ended.cancelled() and (error := ended.exception()) is not None:
        raise RuntimeError("a guide that is compiled already could not be compiled once more") from error


def check_guide(guides: GuideCompiler | None, guide: Guide, num_requests: int = 1) -> None:
    """What a runner answers when it is asked about a guide.

    Raises:
        ValueError: if the guide cannot be followed, or no guide can because there is no compiler.
        EngineBusy: if other requests' guides leave no room for it.
    """
    if guides is None:
        raise ValueError("guide must be None: this runner has no tokenizer to compile it for")
    guides.check(guide, num_requests)


def release_guide(guides: GuideCompiler | None, guide: Guide, num_requests: int = 1) -> None:
    """What a runner does when requests end whose guide was checked."""
    assert guides is not None, "no guide was checked without a compiler"
    guides.release(guide, num_requests)
