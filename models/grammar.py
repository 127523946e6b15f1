"""GuideCompiler: guides compiled for one tokenizer.

llguidance turns a guide into an automaton over bytes, and walks the vocabulary's trie with it (`triode.models.matcher`). The
compiler keeps prototypes of each guide that it has compiled (`triode.models.prototypes`); a sequence gets a copy of one.

What a caller may send is hostile. The text is bounded (`triode.models.guide`), and so is what becomes of it: compiling
has a budget of work and of automaton states, beyond which a guide is refused. Prototypes are kept by the length of their
text, because memory follows it: those of unfinished requests in any case, so that a step never waits for a compiler,
and of the others the last used.
"""

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property

from llguidance import LLMatcher, LLTokenizer

from triode.errors import EngineBusy
from triode.ids import TokenId
from triode.models.grammar_text import grammar_text
from triode.models.guide import Guide, JsonObject
from triode.models.matcher import MaskMaker, Matcher
from triode.models.prototypes import MAX_LEXERS, CompiledGuide, Prototype, compile_prototype, num_sharers
from triode.models.tokenizer import Tokenizer
from triode.models.vocabulary import vocabulary_for

MAX_KEPT_BYTES = 2**21
"""Text of the guides that stay compiled: a compiled one takes up to about 200 times as much."""

MAX_UNHELD = 64
"""Guides that stay compiled although no request has them: what their lexers have grown to stays with them."""

MAX_SPARE = 64
"""Prototypes that are kept beside those that requests need (`prototypes.MAX_SHARERS`) and the first of each guide, all guides together:
a grown one takes up to 40 MB."""


class GuideCompiler:
    """Compiles guides. Methods may be called from any thread."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        """`vocab_size` is the model's: a mask has no other tokens."""
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_token_ids = tuple(token_id for token_id in eos_token_ids if token_id < vocab_size)
        self._lock = threading.Lock()
        self._compiled: OrderedDict[Guide, CompiledGuide] = OrderedDict()
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
            compiled.raise_what_growing_raised()
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
        own = compile_prototype(guide, self._vocabulary)
        matcher.lexer = own.number
        return own.matcher

    def _drop_that_of(self, matcher: Matcher, compiled: CompiledGuide) -> None:
        with self._lock:
            compiled.prototypes = [prototype for prototype in compiled.prototypes if matcher not in prototype.sharers]

    def _provide(self, guide: Guide, compiled: CompiledGuide) -> None:
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
    def _with_room(self, guide: Guide, compiled: CompiledGuide) -> Iterator[Prototype]:
        """The prototype for the next sequence, under the lock. Compiles those that are missing."""
        while True:
            with self._lock:
                if not compiled.is_short:
                    yield compiled.next_one
                    return
            fresh = compile_prototype(guide, self._vocabulary)
            with self._lock:
                self._add(guide, compiled, fresh)

    def _grow(self, guide: Guide, compiled: CompiledGuide) -> None:
        """As many prototypes as those who have the guide now would use; the next ones get them."""
        for _ in range(MAX_LEXERS):
            fresh = compile_prototype(guide, self._vocabulary)
            with self._lock:
                self._add(guide, compiled, fresh)
                if self._is_closing.is_set() or not compiled.is_crowded:
                    return

    def _add(self, guide: Guide, compiled: CompiledGuide, fresh: Prototype) -> None:
        compiled.prototypes.append(fresh)
        if guide in self._compiled:
            # Spare ones of others go first.
            self._compiled.move_to_end(guide)
        self._evict_spares()

    def _find(self, guide: Guide) -> CompiledGuide:
        with self._lock:
            if (compiled := self._compiled.get(guide)) is not None:
                self._compiled.move_to_end(guide)
                return compiled
            vocabulary = self._vocabulary
        compiled = CompiledGuide([compile_prototype(guide, vocabulary)], len(grammar_text(guide).encode()))
        with self._lock:
            return self._keep(guide, compiled)

    def _keep(self, guide: Guide, compiled: CompiledGuide) -> CompiledGuide:
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
                prototypes.remove(max(reversed(prototypes), key=num_sharers))
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
