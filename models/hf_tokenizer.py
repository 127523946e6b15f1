"""The tokenizer of a Hugging Face folder, from tokenizer.json and tokenizer_config.json.

`tokenizers` reads tokenizer.json in a tenth of a second, where importing transformers takes many; so transformers is
asked only where there is no tokenizer.json.
"""

import importlib.util
from collections.abc import Mapping
from pathlib import Path

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from triode.errors import CorruptModel, MissingExtra, UnsupportedModel
from triode.models.hf_config import read_json
from triode.models.tokenizer import Tokenizer, enclose

_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")
# What transformers makes a fast tokenizer from.
_OTHER_FILES = ("tokenizer.model", "vocab.json", "tekken.json", "tiktoken.model")


def read_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer and chat template of the model in `folder`.

    Raises:
        CorruptModel: the folder has no tokenizer, or one that cannot be read.
        MissingExtra: only transformers can read it, and it is not installed.
        UnsupportedModel: transformers has only a tokenizer in Python for it.
    """
    path = folder / "tokenizer_config.json"
    config = read_json(path) if path.is_file() else {}
    special_tokens = {name: text for name in _SPECIAL_TOKENS if (text := _text(config.get(name))) is not None}
    if (folder / "tokenizer.json").is_file():
        backend = _read_backend(folder / "tokenizer.json")
        _add_missing_tokens(backend, config)
        _apply_edges(backend, config, special_tokens, path)
    else:
        backend = _convert(folder)
    return Tokenizer(backend, _chat_template(folder, config), special_tokens)


def _read_backend(path: Path) -> Backend:
    try:
        backend = Backend.from_file(str(path))
    except Exception as error:  # the tokenizers package raises no narrower type
        raise CorruptModel(f"{path} is not a tokenizer: {error}") from error
    # Files saved after training cut and pad every text; a prompt must arrive whole.
    backend.no_truncation()
    backend.no_padding()
    return backend


def _add_missing_tokens(backend: Backend, config: Mapping[str, object]) -> None:
    """Older folders declare some added tokens in tokenizer_config.json alone."""
    declared = config.get("added_tokens_decoder")
    for token in declared.values() if isinstance(declared, dict) else ():
        text = _text(token)
        if text is not None and backend.token_to_id(text) is None:
            backend.add_tokens([AddedToken(text, special=bool(token.get("special")), normalized=False)])


def _apply_edges(backend: Backend, config: Mapping[str, object], special_tokens: Mapping[str, str], path: Path) -> None:
    """`add_bos_token` and `add_eos_token`, where given, replace what tokenizer.json puts around a text."""
    wanted = {edge: config.get(f"add_{edge}_token") for edge in ("bos", "eos")}
    if all(value is None for value in wanted.values()):
        return
    edges = [special_tokens.get(f"{edge}_token") if value else None for edge, value in wanted.items()]
    for token in edges:
        if token is not None and backend.token_to_id(token) is None:
            raise CorruptModel(f"{path} wants {token!r} around each text, which is not in the vocabulary")
    enclose(backend, *edges)


def _chat_template(folder: Path, config: Mapping[str, object]) -> str | None:
    if (path := folder / "chat_template.jinja").is_file():
        return path.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if template is None or isinstance(template, str):
        return template
    entries = template if isinstance(template, list) else []
    named = {entry.get("name"): entry.get("template") for entry in entries if isinstance(entry, dict)}
    if not isinstance(default := named.get("default"), str):
        raise CorruptModel(f"{folder / 'tokenizer_config.json'}: chat_template has no template named 'default'")
    return default


def _text(token: object) -> str | None:
    """A token is its text, or an object that has the text as its content."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


def _convert(folder: Path) -> Backend:
    """Lets transformers make a tokenizer of the older files."""
    if not any((folder / name).is_file() for name in _OTHER_FILES):
        raise CorruptModel(f"{folder} has no tokenizer.json, nor any other file of a tokenizer")
    if importlib.util.find_spec("transformers") is None:
        raise MissingExtra(f"{folder} has no tokenizer.json: pip install 'triode[transformers]' to read its tokenizer")
    # Imported here: it takes seconds.
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except ImportError as error:
        raise MissingExtra(f"{folder}: transformers needs another package to read its tokenizer: {error}") from error
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CorruptModel(f"{folder}: transformers cannot read its tokenizer: {error}") from error
    if not isinstance(backend := getattr(tokenizer, "backend_tokenizer", None), Backend):
        raise UnsupportedModel(
            f"{folder}: its tokenizer {type(tokenizer).__name__} runs in Python, which is not supported"
        )
    return backend
