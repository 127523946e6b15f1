import importlib.util
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from model_files import byte_vocabulary, shape_metadata, write_gguf
from trained_tokenizers import byte_fallback_bpe, byte_level_bpe
from triode.errors import CorruptModel, MissingExtra
from triode.models.gguf import GGUFFile
from triode.models.gguf_tokenizer import read_tokenizer
from triode.models.hf_tokenizer import read_tokenizer as read_folder
from triode.models.progress import NullProgress
from triode.models.source import locate
from triode.models.tokenizer import Tokenizer

TEXTS = [
    "The capital of France is Paris.",
    "你好，世界！今天天气怎么样？",
    "def f(x):\n\treturn x ** 2  # 12345\r\n\n    pass",
    "👩‍👩‍👧 😀 é e\u0301 ñ",
    "  two leading, two trailing  ",
    "",
]


# A function of its own, because Hypothesis and fixtures do not mix.
@cache
def _smollm2() -> Tokenizer:
    return read_tokenizer(GGUFFile(locate("smollm2-135m", NullProgress())))


@pytest.fixture(name="smollm2")
def smollm2_fixture() -> Tokenizer:
    return _smollm2()


@pytest.mark.parametrize("text", TEXTS)
def test_smollm2_gives_back_every_text(smollm2: Tokenizer, text: str) -> None:
    assert smollm2.decode(smollm2.encode(text)) == text


# Its vocabulary lacks some control characters and the first bytes of the planes from 4 on.
@given(text=st.text(st.characters(max_codepoint=0x3FFFF, exclude_categories=["Cs", "Cc"])))
def test_smollm2_gives_back_any_text_of_the_planes_in_use(text: str) -> None:
    tokenizer = _smollm2()
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == text


def test_smollm2_splits_digits_and_finds_special_tokens(smollm2: Tokenizer) -> None:
    assert smollm2.encode("12 34") == [33, 34, 216, 35, 36]
    assert smollm2.encode("<|im_start|>user") == [1, 4093]
    assert smollm2.special_ids >= {0, 1, 2}
    assert smollm2.decode([1, 4093, 2]) == "user"
    assert smollm2.decode([1, 4093, 2], skip_special_tokens=False) == "<|im_start|>user<|im_end|>"


def test_smollm2_renders_a_conversation(smollm2: Tokenizer) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    text = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert smollm2.has_chat_template
    assert smollm2.apply_chat_template(messages) == text
    assert smollm2.apply_chat_template(messages[1:]).startswith("<|im_start|>system\nYou are a helpful AI assistant")


@pytest.mark.parametrize("text", TEXTS)
def test_the_bytes_of_the_tokens_are_the_bytes_of_the_text(smollm2: Tokenizer, text: str) -> None:
    assert b"".join(map(smollm2.token_bytes, smollm2.encode(text))) == text.encode()
    fallback = Tokenizer(byte_fallback_bpe(), None, {})
    pieces = b"".join(map(fallback.token_bytes, fallback.encode(text, add_special_tokens=False)))
    assert pieces == (b" " + text.encode() if text else b"")


def test_special_tokens_are_their_own_bytes_and_ids_beyond_the_vocabulary_have_none(smollm2: Tokenizer) -> None:
    assert smollm2.token_bytes(2) == b"<|im_end|>"
    assert smollm2.token_bytes(smollm2.vocab_size) == b""
    assert smollm2.decode([smollm2.vocab_size + 7]) == ""


@cache
def bare(make: Callable[[], Backend]) -> Tokenizer:
    return Tokenizer(make(), None, {})


@pytest.mark.parametrize("make", [byte_level_bpe, byte_fallback_bpe, lambda: _smollm2().backend])
@given(text=st.text())
def test_no_text_has_fewer_tokens_than_the_bound(make: Callable[[], Backend], text: str) -> None:
    tokenizer = bare(make)
    assert tokenizer.min_tokens(text) <= len(tokenizer.encode(text, add_special_tokens=False))


def test_a_long_text_has_a_bound_worth_asking_for(smollm2: Tokenizer) -> None:
    assert smollm2.min_tokens("word " * 10_000) >= 50_000 / smollm2.max_token_bytes
    assert smollm2.min_tokens("\x06" * 10_000) == len(smollm2.encode("\x06" * 10_000)) == 0


def test_a_token_that_absorbs_spaces_leaves_no_bound() -> None:
    backend = Backend.from_str(byte_level_bpe().to_str())
    backend.add_tokens([AddedToken("<wide>", rstrip=True)])
    assert Tokenizer(backend, None, {}).min_tokens("x" * 10_000) == 0


def test_a_vocabulary_that_drops_whole_characters_leaves_no_bound() -> None:
    backend = Backend(models.BPE({"a": 0}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    assert Tokenizer(backend, None, {}).min_tokens("x" * 10_000) == 0


def test_a_model_without_template_says_so() -> None:
    tokenizer = Tokenizer(byte_level_bpe(), None, {})
    assert not tokenizer.has_chat_template
    with pytest.raises(ValueError, match="this model has no chat template: give the prompt as text or token ids"):
        tokenizer.apply_chat_template([{"role": "user", "content": "x"}])


# What each rule makes of numbers, capitals and line ends is where they differ.
@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("gpt-2", ["HE", "'", "S", " 1234", "!", "\n"]),
        ("smollm", ["HE", "'", "S", " ", "1", "2", "3", "4", "!", "\n"]),
        ("llama-bpe", ["HE", "'S", " ", "123", "4", "!\n"]),
        ("qwen2", ["HE", "'S", " ", "1", "2", "3", "4", "!\n"]),
        ("tekken", ["HE", "'S", " ", "1", "2", "3", "4", "!\n"]),
        ("default", ["HE", "'", "S", " ", "123", "4", "!", "\n"]),
    ],
)
def test_each_pre_tokenizer_splits_by_its_rule(tmp_path: Path, pre: str, pieces: list[str]) -> None:
    backend = tokenizer_of(tmp_path, **byte_vocabulary(pre)).backend
    found = [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str("HE'S 1234!\n")]
    assert [piece.replace("Ġ", " ").replace("Ċ", "\n") for piece in found] == pieces


def tokenizer_of(tmp_path: Path, **metadata: object) -> Tokenizer:
    path = write_gguf(tmp_path / "t.gguf", "llama", shape_metadata("llama") | metadata, {})
    return read_tokenizer(GGUFFile(path))


def test_merges_apply_in_order_of_rank(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(tmp_path, **byte_vocabulary())
    assert [tokenizer.token_bytes(i) for i in tokenizer.encode("hello hell")] == [b"hello", b" ", b"hell"]


@pytest.mark.parametrize(
    ("pre", "flags", "edges"),
    [
        ("gpt-2", {}, (False, False)),
        ("llama-bpe", {}, (True, False)),
        ("llama-bpe", {"tokenizer.ggml.add_bos_token": False}, (False, False)),
        ("gpt-2", {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True}, (True, True)),
    ],
)
def test_bos_and_eos_are_added_as_the_metadata_says(
    tmp_path: Path, pre: str, flags: dict[str, object], edges: tuple[bool, bool]
) -> None:
    tokenizer = tokenizer_of(tmp_path, **byte_vocabulary(pre), **flags)
    plain = tokenizer.encode("x", add_special_tokens=False)
    assert tokenizer.encode("x") == [0] * edges[0] + plain + [1] * edges[1]


SENTENCE_PIECE = [
    "<unk>",
    "<s>",
    "</s>",
    *(f"<0x{byte:02X}>" for byte in range(256)),
    *"▁helo",
    "he",
    "ll",
    "hell",
    "hello",
    "▁hello",
]


def sentence_piece(tmp_path: Path, **changes: object) -> Tokenizer:
    ordinary = len(SENTENCE_PIECE) - 259
    return tokenizer_of(
        tmp_path,
        **{
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": SENTENCE_PIECE,
            "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * ordinary,
            "tokenizer.ggml.scores": [0.0] * 259 + [-float(rank) for rank in range(ordinary)],
            "tokenizer.ggml.bos_token_id": 1,
            "tokenizer.ggml.eos_token_id": 2,
            **changes,
        },
    )


def test_sentence_piece_merges_by_score_and_falls_back_to_bytes(tmp_path: Path) -> None:
    tokenizer = sentence_piece(tmp_path)
    tokens = [tokenizer.backend.id_to_token(i) for i in tokenizer.encode("hello hell é")]
    assert tokens == ["<s>", "▁hello", "▁", "hell", "▁", "<0xC3>", "<0xA9>"]
    assert tokenizer.decode(tokenizer.encode("hello hell é")) == "hello hell é"


def test_sentence_piece_without_a_leading_space(tmp_path: Path) -> None:
    tokenizer = sentence_piece(tmp_path, **{"tokenizer.ggml.add_space_prefix": False})
    assert [tokenizer.token_bytes(i) for i in tokenizer.encode("hello")] == [b"<s>", b"hello"]
    assert tokenizer.decode(tokenizer.encode(" hello")) == " hello"


def test_sentence_piece_needs_scores(tmp_path: Path) -> None:
    with pytest.raises(CorruptModel, match=r"tokenizer\.ggml\.scores must have a number for each"):
        sentence_piece(tmp_path, **{"tokenizer.ggml.scores": [1.0]})


def folder(tmp_path: Path, **config: object) -> Path:
    byte_level_bpe().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<s>", "eos_token": {"content": "</s>"}, **config})
    )
    return tmp_path


def test_a_folder_gives_its_tokenizer_and_template(tmp_path: Path) -> None:
    tokenizer = read_folder(folder(tmp_path, chat_template="{{ bos_token }}{{ messages[0].content }}{{ eos_token }}"))
    assert tokenizer.decode(tokenizer.encode("naïve 你好")) == "naïve 你好"
    assert tokenizer.apply_chat_template([{"role": "user", "content": "x"}]) == "<s>x</s>"


def test_a_template_file_wins_over_the_config(tmp_path: Path) -> None:
    (folder(tmp_path, chat_template="config") / "chat_template.jinja").write_text("file")
    assert read_folder(tmp_path).apply_chat_template([{"role": "user", "content": "x"}]) == "file"


def test_of_several_templates_the_default_is_taken(tmp_path: Path) -> None:
    templates = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    tokenizer = read_folder(folder(tmp_path, chat_template=templates))
    assert tokenizer.apply_chat_template([{"role": "user", "content": "x"}]) == "plain"
    with pytest.raises(CorruptModel, match="chat_template has no template named 'default'"):
        read_folder(folder(tmp_path, chat_template=templates[:1]))


def test_a_folder_adds_bos_and_eos_where_its_config_says_so(tmp_path: Path) -> None:
    plain = read_folder(folder(tmp_path)).encode("x")
    both = read_folder(folder(tmp_path, add_bos_token=True, add_eos_token=True))
    assert both.encode("x") == [both.backend.token_to_id("<s>"), *plain, both.backend.token_to_id("</s>")]
    assert both.encode("x", add_special_tokens=False) == plain


def test_tokens_of_the_config_alone_are_added(tmp_path: Path) -> None:
    tokenizer = read_folder(folder(tmp_path, added_tokens_decoder={"9999": {"content": "<extra>", "special": True}}))
    (token_id,) = tokenizer.encode("<extra>")
    assert token_id in tokenizer.special_ids


def test_truncation_and_padding_of_training_are_dropped(tmp_path: Path) -> None:
    backend = Backend.from_str(byte_level_bpe().to_str())
    backend.enable_truncation(2)
    backend.enable_padding(length=9)
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = read_folder(tmp_path)
    assert tokenizer.decode(tokenizer.encode("a long text")) == "a long text"


def test_a_folder_without_tokenizer_is_corrupt(tmp_path: Path) -> None:
    with pytest.raises(CorruptModel, match=r"has no tokenizer\.json, nor any other file of a tokenizer"):
        read_folder(tmp_path)


def test_a_broken_tokenizer_is_corrupt(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"model": 1}')
    with pytest.raises(CorruptModel, match=r"tokenizer\.json is not a tokenizer"):
        read_folder(tmp_path)


@pytest.mark.slow
def test_transformers_reads_what_has_no_tokenizer_json(tmp_path: Path) -> None:
    backend = byte_level_bpe()
    backend.model.save(str(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "Qwen2Tokenizer", "eos_token": "</s>"}')
    assert read_folder(tmp_path).encode("hello 你好") == backend.encode("hello 你好").ids


def test_without_transformers_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"pip install 'triode\[transformers\]'"):
        read_folder(tmp_path)
