"""Prototypes of a guide: what the matchers of the sequences that follow it are copied from.

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

from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import count
from weakref import WeakSet

from llguidance import LLMatcher, LLTokenizer

from triode.models.grammar_text import grammar_text
from triode.models.guide import Grammar, Guide
from triode.models.matcher import GRAMMAR_LIMITS, LIMITS, MASK_THREADS, Matcher, reason_of

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


@dataclass(slots=True, eq=False)
class Prototype:
    """A matcher that copies are made of, for those who share its lexer."""

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
class CompiledGuide:
    """A guide's prototypes, and who counts on them. Belongs under its compiler's lock."""

    prototypes: list[Prototype]
    num_bytes: int
    """Of the grammar's text."""
    num_holders: int = 0
    """Unfinished requests that have the guide, or may have it."""
    growing: "Future[None] | None" = None
    """How it gets more prototypes in the background."""

    @property
    def next_one(self) -> Prototype:
        """The one that the fewest have is copied first."""
        return min(self.prototypes, key=num_sharers)

    @property
    def num_needed(self) -> int:
        """Prototypes without which some would have too many sharers."""
        return max(1, -(-self.num_holders // MAX_SHARERS))

    @property
    def is_short(self) -> bool:
        """Whether there is none for the next sequence, or may be none for one of those that hold the guide."""
        return len(self.prototypes) < self.num_needed or num_sharers(self.next_one) >= MAX_SHARERS

    @property
    def is_crowded(self) -> bool:
        """Whether sequences would wait for each other less if there were another."""
        num_prototypes = len(self.prototypes)
        return num_prototypes < MAX_LEXERS and sum(map(num_sharers, self.prototypes)) > FEW_SHARERS * num_prototypes

    def drop(self, spent: Prototype) -> None:
        """Give it to nobody any more."""
        if spent in self.prototypes:
            self.prototypes.remove(spent)

    def raise_what_growing_raised(self) -> None:
        """One that has not ended goes on; one that was cancelled is as if it had never been.

        Raises:
            RuntimeError: growing in the background has raised an exception.
        """
        if self.growing is None or not self.growing.done():
            return
        ended, self.growing = self.growing, None
        if not ended.cancelled() and (error := ended.exception()) is not None:
            raise RuntimeError("a guide that is compiled already could not be compiled once more") from error


def num_sharers(prototype: Prototype) -> int:
    """Sequences that have it now."""
    return len(prototype.sharers)


def compile_prototype(guide: Guide, vocabulary: LLTokenizer) -> Prototype:
    """A guide's next prototype, with a lexer of its own.

    Raises:
        ValueError: with the reason why it cannot be followed.
    """
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
    return Prototype(prototype)
