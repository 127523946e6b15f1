"""Small tokenizers of every supported decoder family, trained in a fraction of a second."""

import json
from functools import cache

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

LATIN = (
    "The quick brown fox jumps over the lazy dog, and the dog does not care.",
    "def main() -> None:\n    print('hello, world')\n\n\tfor i in range(10):  # tabs and   runs of spaces\n",
    "Der Fluß führt über die Brücke; l'élève a été à l'école, où ça va être l'été.",
) * 4
OTHER_SCRIPTS = (
    "敏捷的棕色狐狸跳过懒狗。你好，世界！日本語のテキスト。",
    "Съешь же ещё этих мягких французских булок, да выпей чаю.",
    "👩‍👩‍👧‍👦 family, 🏳️‍🌈 flag, 👍🏽 thumb, é as e + combining accent: e\u0301, ไทย, हिन्दी",
) * 4
SPECIAL_TOKENS = ["<unk>", "<s>", "</s>", "<|im_end|>"]
# One is spelled with a space, one with a letter of GPT-2's byte alphabet, one with SentencePiece's mark.
ADDED_TOKENS = [AddedToken(content, special=False) for content in ("<tool call>", "<é>", "<▁mark>")]
BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]


@cache
def byte_level_bpe() -> Tokenizer:
    """As GPT-2, Llama 3, Qwen and SmolLM2."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=SPECIAL_TOKENS, initial_alphabet=alphabet, show_progress=False
    )
    return _trained(tokenizer, trainer, LATIN + OTHER_SCRIPTS)


@cache
def byte_fallback_bpe() -> Tokenizer:
    """As Llama 2 and Mistral: spaces are marks, what the vocabulary lacks is spelled in bytes."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=[*SPECIAL_TOKENS, *BYTE_TOKENS], show_progress=False)
    trained = _trained(tokenizer, trainer, LATIN)
    # Byte tokens are ordinary tokens of a SentencePiece vocabulary; the trainer could only add them as special ones.
    return _with_ordinary_byte_tokens(trained)


@cache
def byte_fallback_from_gguf() -> Tokenizer:
    """The same vocabulary with the decoders in the order that GGUF conversions use."""
    tokenizer = Tokenizer.from_str(byte_fallback_bpe().to_str())
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Fuse(), decoders.Replace("▁", " "), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


@cache
def metaspace_unigram() -> Tokenizer:
    """As SentencePiece's unigram models without byte tokens."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=400, special_tokens=SPECIAL_TOKENS, unk_token="<unk>", show_progress=False
    )
    return _trained(tokenizer, trainer, LATIN + OTHER_SCRIPTS)


def id_of(tokenizer: Tokenizer, token: str) -> int:
    """The id of a token that must be there."""
    token_id = tokenizer.token_to_id(token)
    assert token_id is not None
    return token_id


def _trained(tokenizer: Tokenizer, trainer: trainers.Trainer, corpus: tuple[str, ...]) -> Tokenizer:
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.add_tokens(ADDED_TOKENS)
    return tokenizer


def _with_ordinary_byte_tokens(tokenizer: Tokenizer) -> Tokenizer:
    description = json.loads(tokenizer.to_str())
    description["added_tokens"] = [
        token for token in description["added_tokens"] if not token["content"].startswith("<0x")
    ]
    return Tokenizer.from_str(json.dumps(description))
