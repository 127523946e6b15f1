"""GuideCompiler: guides compiled for one tokenizer, and the masks of tokens that may come next.

llguidance turns a guide into an automaton over bytes and walks the vocabulary's trie with it. A *matcher* is how far one
sequence has come. The compiler keeps a prototype of each guide that it has compiled; a sequence gets a copy.

What a caller may send is hostile. The text is bounded (`triode.models.guide`), and so is what becomes of it: compiling and
each mask have a budget of work and of automaton states (`LIMITS`), beyond which compiling is refused, or the one sequence
fails. Prototypes are kept by the length of their text, because memory follows it.

    G matchers        W 32-bit words of a mask, one bit a token
"""

import json
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt
from llguidance import LLExecutor, LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

from triode.ids import TokenId
from triode.models.guide import Choices, Grammar, Guide, JsonObject, JsonSchema, Regex
from triode.models.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

MaskWords = npt.NDArray[np.int32]

MAX_CACHED_BYTES = 2**21
"""Text of the guides that stay compiled: a compiled one takes up to about 200 times as much."""

LIMITS = LLParserLimits(
    initial_lexer_fuel=1_000_000,
    step_lexer_fuel=100_000,
    max_items_in_row=1_000,
    step_max_items=10_000,
    max_lexer_states=20_000,
    verbose_errors=False,
)
"""About 20 ms to build the lexer, 10 ms to walk it for a mask, and 40 MB a sequence. What the parser does with ambiguous
grammars is bounded less well: `MAX_MASK_S`."""

MAX_MASK_S = 0.05
"""Processor time after which a sequence fails, because neighbours wait for its masks. Well-meant guides take a thousandth."""

_MARK = "\x02"

_WHITE_SPACE = r"[\x20\x0A\x0D\x09]{1,40}"
"""Between tokens of JSON; without a bound, a model at a loss for words would fill its output with it."""


class Matcher:
    """How far one sequence has come in its guide."""

    def __init__(self, inner: LLMatcher, compiler: "GuideCompiler") -> None:
        self.inner = inner
        self.compiler = compiler
        self.error: str | None = None
        """Why the guide cannot be followed any more; the sequence fails with it."""
        self.is_suspect = False
        """Whether its masks may be what others have waited for; they are made one by one then, and timed."""
        self._unread: list[TokenId] = []

    def append(self, token_id: TokenId) -> None:
        """The sequence goes on with a token that the mask allowed. It is read when the next mask is asked for."""
        self._unread.append(token_id)

    def take_unread(self) -> list[TokenId]:
        """Tokens appended since the last call. Past the end of the output nothing is read."""
        unread, self._unread = self._unread, []
        return [] if self.error is not None or self.inner.is_stopped() else unread

    def force(self, max_tokens: int) -> list[TokenId]:
        """The next tokens, where the guide leaves no choice: as many as are certain, at most `max_tokens`. They are read.

        At the end of the output that is the end-of-sequence token.
        """
        unread = self.take_unread()
        if unread and not self.inner.consume_tokens([*unread]):
            self.check()
        if self.error is not None:
            return []
        if self.inner.is_stopped():
            return [self.compiler.eos_token_id][:max_tokens]
        forced = self.inner.compute_ff_tokens()[:max_tokens]
        if forced and not self.inner.consume_tokens(forced):
            self.check()
            return []
        return [TokenId(token_id) for token_id in forced]

    def check(self) -> None:
        """Notice that llguidance has given up."""
        if self.error is None and self.inner.is_error():
            self.error = f"the guide cannot be followed any further: {_reason(self.inner)}"


class _Compiled(NamedTuple):
    prototype: LLMatcher
    num_bytes: int
    """Of the grammar's text."""


class GuideCompiler:
    """Compiles guides. Methods may be called from any thread."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        """`vocab_size` is the model's: a mask has no other tokens."""
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_token_ids = tuple(token_id for token_id in eos_token_ids if token_id < vocab_size)
        self._lock = threading.Lock()
        self._compiled: OrderedDict[Guide, _Compiled] = OrderedDict()
        self._cached_bytes = 0

    @property
    def eos_token_id(self) -> TokenId:
        """What a sequence ends with."""
        return TokenId(self._eos_token_ids[0])

    @property
    def num_words(self) -> int:
        """W: enough for the model's tokens and the tokenizer's."""
        return -(-max(self._vocab_size, self._tokenizer.vocab_size) // 32)

    def warm(self) -> None:
        """Do at once what the first guide would wait for. A model that can have no guide needs nothing."""
        if self._eos_token_ids:
            self.check(JsonObject())

    def check(self, guide: Guide) -> None:
        """Compile a guide, unless it is compiled already.

        Raises:
            ValueError: with the reason why it cannot be followed.
        """
        self._prototype(guide)

    def matcher(self, guide: Guide, token_ids: Sequence[TokenId]) -> Matcher:
        """A matcher for a sequence that has generated `token_ids` so far."""
        matcher = Matcher(self._prototype(guide).deep_copy(), self)
        for token_id in token_ids:
            matcher.append(token_id)
        return matcher

    def fill(self, matchers: Sequence[Matcher], mask_GW: MaskWords) -> None:
        """Each matcher's mask of what may come next, in parallel and without the interpreter's lock.

        Nothing may come next where a matcher has an error, which this may bring.
        """
        assert mask_GW.flags.c_contiguous, "llguidance writes to the array's memory"
        trusted = [row for row, matcher in enumerate(matchers) if matcher.error is None and not matcher.is_suspect]
        suspect = [row for row, matcher in enumerate(matchers) if matcher.error is None and matcher.is_suspect]
        start_s = time.perf_counter()
        self._fill_together(matchers, trusted, mask_GW)
        if time.perf_counter() - start_s > MAX_MASK_S:
            for row in trusted:
                matchers[row].is_suspect = True
        for row in suspect:
            _fill_timed(matchers[row], mask_GW[row])
        for row, matcher in enumerate(matchers):
            if matcher.error is not None:
                mask_GW[row] = 0

    def _fill_together(self, matchers: Sequence[Matcher], rows: list[int], mask_GW: MaskWords) -> None:
        unread = [(matchers[row], token_ids) for row in rows if (token_ids := matchers[row].take_unread())]
        if unread:
            self._executor.consume_token_par([(matcher.inner, token_ids[0]) for matcher, token_ids in unread])
        for matcher, token_ids in unread:
            if len(token_ids) > 1:
                matcher.inner.consume_tokens([*token_ids[1:]])
        if rows:
            inner = [(matchers[row].inner, row) for row in rows]
            self._executor.unsafe_compute_mask_ptr(inner, mask_GW.ctypes.data, mask_GW[0].nbytes, len(mask_GW))
        for row in rows:
            matchers[row].check()

    def in_thread(self, fill: Callable[[], None]) -> "Future[None]":
        """Have it done in the thread that makes masks."""
        return self._thread.submit(fill)

    def _prototype(self, guide: Guide) -> LLMatcher:
        with self._lock:
            if (compiled := self._compiled.get(guide)) is not None:
                self._compiled.move_to_end(guide)
                return compiled.prototype
            vocabulary = self._vocabulary
        try:
            grammar = _grammar(guide)
        except ValueError as error:
            raise ValueError(f"guide cannot be compiled: {error}") from error
        prototype = LLMatcher(vocabulary, grammar, log_level=0, limits=LIMITS)
        # The first mask builds most of what later ones need, and shows a guide that is too complex from the start.
        if not prototype.is_error():
            prototype.compute_bitmask()
        if prototype.is_error():
            raise ValueError(f"guide cannot be compiled: {_reason(prototype)}")
        with self._lock:
            self._keep(guide, _Compiled(prototype, len(grammar)))
        return prototype

    def _keep(self, guide: Guide, compiled: "_Compiled") -> None:
        if guide not in self._compiled:
            self._cached_bytes += compiled.num_bytes
        self._compiled[guide] = compiled
        while self._cached_bytes > MAX_CACHED_BYTES and len(self._compiled) > 1:
            _, oldest = self._compiled.popitem(last=False)
            self._cached_bytes -= oldest.num_bytes

    def close(self) -> None:
        """End the thread that makes masks. Idempotent; another one begins when masks are asked for again."""
        thread: ThreadPoolExecutor | None = self.__dict__.pop("_thread", None)
        if thread is not None:
            thread.shutdown()

    @cached_property
    def _thread(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(1, thread_name_prefix="triode-masks")

    @cached_property
    def _executor(self) -> LLExecutor:
        return LLExecutor()

    @cached_property
    def _vocabulary(self) -> LLTokenizer:
        # Made on first use, because it takes the better part of a second.
        if not self._eos_token_ids:
            raise ValueError("guide must be None: this model has no end-of-sequence token to end an output with")
        return vocabulary_for(self._tokenizer, self._vocab_size, self._eos_token_ids)


def _fill_timed(matcher: Matcher, mask_W: MaskWords) -> None:
    """One mask, made by this thread, whose own time does not depend on how busy the machine is."""
    start_s = time.thread_time()
    matcher.inner.consume_tokens([*matcher.take_unread()])
    matcher.inner.unsafe_compute_mask_ptr(mask_W.ctypes.data, mask_W.nbytes)
    matcher.check()
    if matcher.error is None and (took_s := time.thread_time() - start_s) > MAX_MASK_S:
        matcher.error = f"the guide is too ambiguous: finding what may come next took {took_s:.2f} s of processor time"


def check_guide(guides: GuideCompiler | None, guide: Guide) -> None:
    """What a runner answers when it is asked about a guide.

    Raises:
        ValueError: if the guide cannot be followed, or no guide can because there is no compiler.
    """
    if guides is None:
        raise ValueError("guide must be None: this runner has no tokenizer to compile it for")
    guides.check(guide)


def vocabulary_for(tokenizer: Tokenizer, vocab_size: int, eos_token_ids: tuple[int, ...]) -> LLTokenizer:
    """The trie of all tokens, with what masks have in common."""
    return LLTokenizer(
        TokenizerWrapper(Vocabulary(tokenizer, eos_token_ids[0])),
        n_vocab=max(vocab_size, tokenizer.vocab_size),
        eos_token=list(eos_token_ids),
    )


class Vocabulary:
    """A tokenizer as llguidance wants one."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, eos_token_id: int) -> None:
        self.eos_token_id = eos_token_id
        self.tokens = [tokenizer.token_bytes(token_id) for token_id in range(tokenizer.vocab_size)]
        """The bytes that each token stands for."""
        self.special_token_ids = sorted(tokenizer.special_ids)
        self._encode = tokenizer.encode

    def __call__(self, text: str) -> list[int]:
        """Tokens that spell `text` and nothing else, as the model would have seen them in the middle of a text."""
        data = text.encode()
        token_ids = self._encode(text, add_special_tokens=False)
        if self._spelled(token_ids) == data:
            return token_ids
        # Some put a space before each text: this one then goes to the mark, which is taken off again.
        token_ids = self._encode(_MARK + text, add_special_tokens=False)
        for start in range(1, len(token_ids) + 1):
            if self._spelled(token_ids[:start]).endswith(_MARK.encode()):
                return token_ids[start:] if self._spelled(token_ids[start:]) == data else self._longest(data)
        return self._longest(data)

    def _spelled(self, token_ids: Sequence[int]) -> bytes:
        return b"".join([self.tokens[token_id] for token_id in token_ids])

    def _longest(self, data: bytes) -> list[int]:
        """The longest token that fits, again and again: for texts that the tokenizer would change."""
        token_ids = []
        while data:
            ends = range(min(len(data), self._max_bytes), 0, -1)
            token_id = next((self._id_of[data[:end]] for end in ends if data[:end] in self._id_of), None)
            if token_id is None:
                break
            token_ids.append(token_id)
            data = data[len(self.tokens[token_id]) :]
        return token_ids

    @cached_property
    def _id_of(self) -> dict[bytes, int]:
        special = set(self.special_token_ids)
        return {spelling: token_id for token_id, spelling in enumerate(self.tokens) if token_id not in special}

    @cached_property
    def _max_bytes(self) -> int:
        return max(map(len, self._id_of))


def _grammar(guide: Guide) -> str:
    """In llguidance's own JSON form."""
    match guide:
        case JsonSchema(schema, compact):
            return _json_grammar(str(schema), compact=compact)
        case JsonObject(compact):
            return _json_grammar('{"type": "object"}', compact=compact)
        case Regex(pattern):
            return LLMatcher.grammar_from_regex(pattern)
        case Choices(options):
            # One automaton serves them all, where alternatives of a grammar would each be followed on their own.
            return LLMatcher.grammar_from_regex("|".join(map(_literal, options)))
        case Grammar(lark):
            return json.dumps({"grammars": [{"lark_grammar": lark}]})


def _json_grammar(schema: str, *, compact: bool) -> str:
    # These outweigh what a schema may say for itself under "x-guidance".
    overrides: JsonCompileOptions = {"lenient": False, "coerce_one_of": False}
    if compact:
        overrides["whitespace_flexible"] = False
    else:
        overrides["whitespace_pattern"] = _WHITE_SPACE
    return LLMatcher.grammar_from_json_schema(schema, overrides=overrides)


def _literal(text: str) -> str:
    """A regular expression of this text alone."""
    return "".join(c if c.isascii() and c.isalnum() else f"\\x{{{ord(c):x}}}" for c in text)


def _reason(matcher: LLMatcher) -> str:
    """The first lines of what llguidance says; a picture of its state follows."""
    return matcher.get_error().partition("<non-verbose/>")[0].strip()
