"""A tokenizer from GGUF metadata, rebuilt from the parts of Hugging Face's `tokenizers`.

GGUF stores the vocabulary and the *name* of the rules that split text before BPE (`tokenizer.ggml.pre`); the rules
themselves live in llama.cpp's src/llama-vocab.cpp and in the models' tokenizer.json files, from which they are taken.
"""

from enum import IntEnum
from typing import cast

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from triode.errors import CorruptModel, UnsupportedModel
from triode.models.gguf import GGUFFile, MetadataValue
from triode.models.tokenizer import SPACE_MARK, Tokenizer, enclose

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
_QWEN2 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    rf"|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
)
_DIGIT = r"\p{N}"

# Name → the expressions that split the text one after another.
_SPLITS: dict[str, tuple[str, ...]] = {
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"),
    "gpt-2": (_GPT2,),
    "smollm": (_DIGIT, _GPT2),
    "starcoder": (_DIGIT, _GPT2),
    "refact": (_DIGIT, _GPT2),
    "command-r": (_DIGIT, _GPT2),
    "llama3": (_LLAMA3,),
    "llama-v3": (_LLAMA3,),
    "llama-bpe": (_LLAMA3,),
    "qwen2": (_QWEN2,),
    "deepseek-r1-qwen": (_QWEN2,),
    "tekken": (_TEKKEN,),
}
_LLAMA3_NAMES = frozenset({"llama3", "llama-v3", "llama-bpe"})
# A word that is a token of its own is taken whole, without merging.
_WHOLE_WORDS = _LLAMA3_NAMES | {"tekken"}
_BEGINS_WITH_BOS = _LLAMA3_NAMES | {"tekken"}
_COMPOSED = frozenset({"qwen2", "deepseek-r1-qwen"})


class _TokenType(IntEnum):
    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4


def read_tokenizer(file: GGUFFile) -> Tokenizer:
    """The tokenizer and chat template of the model in `file`.

    Raises:
        CorruptModel: a needed key is missing or contradicts another.
        UnsupportedModel: the kind of vocabulary or its pre-tokenizer is unknown.
    """
    metadata = _Metadata(file)
    match kind := metadata.string("tokenizer.ggml.model"):
        case "gpt2":
            backend, adds_bos = _byte_level(metadata)
        case "llama":
            backend, adds_bos = _sentence_piece(metadata), True
        case _:
            raise UnsupportedModel(f"{file.path}: unsupported tokenizer.ggml.model {kind!r}; supported are gpt2, llama")
    _add_special_tokens(backend, metadata)
    bos = metadata.token("bos") if metadata.flag("add_bos_token", adds_bos) else None
    eos = metadata.token("eos") if metadata.flag("add_eos_token", False) else None
    enclose(backend, bos, eos)
    special_tokens = {f"{name}_token": token for name in _NAMED if (token := metadata.token(_NAMED[name])) is not None}
    return Tokenizer(backend, metadata.string("tokenizer.chat_template"), special_tokens)


# A template's name for a token → GGUF's.
_NAMED = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}


class _Metadata:
    """The `tokenizer.*` keys of a file."""

    def __init__(self, file: GGUFFile) -> None:
        self.path = file.path
        self._values = file.metadata
        self.tokens = self.strings("tokens")
        self.types = self._numbers("token_type", [_TokenType.NORMAL] * len(self.tokens))
        if len(set(self.tokens)) != len(self.tokens):
            raise CorruptModel(f"{self.path}: tokenizer.ggml.tokens has a token twice")

    def string(self, key: str) -> str | None:
        value = self._values.get(key)
        return value if isinstance(value, str) else None

    def strings(self, key: str) -> list[str]:
        values = self._values.get(f"tokenizer.ggml.{key}")
        if not isinstance(values, list) or not values or not isinstance(values[0], str):
            raise CorruptModel(f"{self.path}: tokenizer.ggml.{key} must be a list of strings")
        # An array has one element type.
        return cast("list[str]", values)

    def scores(self) -> list[float]:
        return self._numbers("scores", None)

    def _numbers(self, key: str, default: list[float] | None) -> list[float]:
        values = self._values.get(f"tokenizer.ggml.{key}", cast("MetadataValue | None", default))
        if not isinstance(values, list) or len(values) != len(self.tokens) or isinstance(values[0], str):
            raise CorruptModel(f"{self.path}: tokenizer.ggml.{key} must have a number for each of the tokens")
        return cast("list[float]", values)

    def flag(self, key: str, default: bool) -> bool:
        return bool(self._values.get(f"tokenizer.ggml.{key}", default))

    def token(self, key: str) -> str | None:
        """The text of the token whose id is stored under `key`."""
        token_id = self._values.get(f"tokenizer.ggml.{key}_token_id")
        if not isinstance(token_id, int):
            return None
        if not 0 <= token_id < len(self.tokens):
            raise CorruptModel(f"{self.path}: tokenizer.ggml.{key}_token_id is {token_id} of {len(self.tokens)} tokens")
        return self.tokens[token_id]


def _byte_level(metadata: _Metadata) -> tuple[Backend, bool]:
    """GPT-2's kind: BPE over bytes, merges in order of rank."""
    name = metadata.string("tokenizer.ggml.pre") or "default"
    if name not in _SPLITS:
        raise UnsupportedModel(
            f"{metadata.path}: unsupported tokenizer.ggml.pre {name!r}; supported are {', '.join(_SPLITS)}"
        )
    vocab = {token: token_id for token_id, token in enumerate(metadata.tokens)}
    merges = [_merge(metadata, text) for text in metadata.strings("merges")]
    try:
        model = models.BPE(vocab, merges, ignore_merges=name in _WHOLE_WORDS)
    except Exception as error:  # the tokenizers package raises no narrower type
        raise CorruptModel(f"{metadata.path}: tokenizer.ggml.merges do not fit the vocabulary: {error}") from error
    backend = Backend(model)
    if name in _COMPOSED:
        backend.normalizer = normalizers.NFC()
    splits = [pre_tokenizers.Split(Regex(expression), "isolated") for expression in _SPLITS[name]]
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, bytes_only])
    backend.decoder = decoders.ByteLevel()
    return backend, name in _BEGINS_WITH_BOS


def _merge(metadata: _Metadata, text: str) -> tuple[str, str]:
    left, _, right = text.partition(" ")
    if not left or not right:
        raise CorruptModel(f"{metadata.path}: tokenizer.ggml.merges has {text!r}, which is not a pair")
    return left, right


def _sentence_piece(metadata: _Metadata) -> Backend:
    """Llama 2's kind: BPE over characters, the better-scored token first, bytes for what is not in the vocabulary."""
    vocab = {token: token_id for token_id, token in enumerate(metadata.tokens)}
    unknown = next((i for i, kind in enumerate(metadata.types) if kind == _TokenType.UNKNOWN), None)
    model = models.BPE(
        vocab,
        _merges_by_score(metadata, vocab),
        unk_token=None if unknown is None else metadata.tokens[unknown],
        fuse_unk=True,
        byte_fallback=True,
    )
    backend = Backend(model)
    spaces = normalizers.Replace(" ", SPACE_MARK)
    adds_space = metadata.flag("add_space_prefix", True)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE_MARK), spaces]) if adds_space else spaces
    parts = [decoders.Replace(SPACE_MARK, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)] if adds_space else parts)
    return backend


def _merges_by_score(metadata: _Metadata, vocab: dict[str, int]) -> list[tuple[str, str]]:
    """Every way to put a token together from two, the ways of better-scored tokens first."""
    merges: list[tuple[float, int, int, str, str]] = []
    scores = metadata.scores()
    for token_id, token in enumerate(metadata.tokens):
        if metadata.types[token_id] != _TokenType.NORMAL:
            continue
        for cut in range(1, len(token)):
            left, right = vocab.get(token[:cut]), vocab.get(token[cut:])
            if left is not None and right is not None:
                merges.append((-scores[token_id], left, right, token[:cut], token[cut:]))
    return [(left, right) for _, _, _, left, right in sorted(merges)]


def _add_special_tokens(backend: Backend, metadata: _Metadata) -> None:
    """Control and user-defined tokens are found in text before anything else splits it."""
    for kind, special in ((_TokenType.CONTROL, True), (_TokenType.UNKNOWN, True), (_TokenType.USER_DEFINED, False)):
        tokens = [token for token, its_kind in zip(metadata.tokens, metadata.types, strict=True) if its_kind == kind]
        backend.add_tokens([AddedToken(token, special=special, normalized=False) for token in tokens])
