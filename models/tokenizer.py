"""Text to token ids and back."""

import json
from collections.abc import Mapping, Sequence
from functools import cached_property

from tokenizers import Tokenizer as Backend
from tokenizers.decoders import Decoder
from tokenizers.normalizers import Normalizer
from tokenizers.processors import TemplateProcessing

from triode.models.byte_alphabet import BYTE_OF_CHARACTER
from triode.models.chat import ChatTemplate, Message
from triode.models.conversation import Conversation

# Unicode's normal forms shorten UTF-8 by at most this factor: 3 for singletons such as U+212A, 3 for composition.
_MAX_NFC_SHRINK = 9
SPACE_MARK = "\u2581"


class Tokenizer:
    """A vocabulary with its rules, and the model's chat template.

    Methods may be called from any thread.
    """

    def __init__(self, backend: Backend, chat_template: str | None, special_tokens: Mapping[str, str]) -> None:
        """`special_tokens` are the names by which a template knows tokens, `bos_token` and the like."""
        self.backend = backend
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self._added_text = {token_id: token.content for token_id, token in added.items()}
        self._absorbs_spaces = any(token.lstrip or token.rstrip for token in added.values())
        self._chat_template = chat_template
        self._special_tokens = special_tokens

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The ids of `text`; with special tokens as the model wants raw text to begin and end."""
        return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of the ids; bytes that are not UTF-8 become U+FFFD. Ids beyond the vocabulary have no text."""
        return self.backend.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for, out of context; empty for an id beyond the vocabulary."""
        if (text := self._added_text.get(token_id)) is not None:
            return text.encode()
        token = self.backend.id_to_token(token_id)
        return b"" if token is None else self._piece_bytes(token)

    @property
    def has_chat_template(self) -> bool:
        """Whether messages can be given instead of text."""
        return self._chat_template is not None

    @property
    def chat_template(self) -> str | None:
        """The template's source."""
        return self._chat_template

    def apply_chat_template(
        self, messages: Sequence[Message] | Conversation, *, add_generation_prompt: bool = True
    ) -> str:
        """The prompt for a conversation; encode it without special tokens, for it has its own.

        Raises:
            ValueError: the model has no template, or a message is malformed or refused by the template.
        """
        if not isinstance(messages, Conversation):
            return self._template.render(messages, add_generation_prompt=add_generation_prompt)
        return self._template.render(
            messages.messages,
            add_generation_prompt=add_generation_prompt,
            tools=messages.tools,
            options=messages.options,
        )

    @cached_property
    def _template(self) -> ChatTemplate:
        # Compiled on first use, so that a model whose template is broken still completes text.
        if self._chat_template is None:
            raise ValueError("this model has no chat template: give the prompt as text or token ids")
        return ChatTemplate(self._chat_template, self._special_tokens)

    def min_tokens(self, text: str) -> int:
        """A number of tokens that `text` has at least, found without encoding it; 0 where nothing is certain."""
        if self._shrink is None:
            return 0
        num_bytes = len(text.encode().translate(None, self._dropped_bytes))
        return -(-num_bytes // (self._shrink * self.max_token_bytes))

    @cached_property
    def max_token_bytes(self) -> int:
        """The most bytes that one token stands for."""
        return max(len(self.token_bytes(token_id)) for token_id in range(self.vocab_size))

    @cached_property
    def _shrink(self) -> int | None:
        """The most by which normalisation shortens a text; None if tokens can take any number of bytes."""
        shrink = _SHRINK_OF_NORMALIZER.get(_kind(self.backend.normalizer))
        # What is dropped is known before normalisation only if normalisation leaves it alone.
        if self._absorbs_spaces or (shrink != 1 and self._dropped_bytes):
            return None
        return shrink

    @cached_property
    def _dropped_bytes(self) -> bytes:
        """The bytes that encoding leaves out, or fuses into one unknown token, as it has no tokens for them."""
        if self._is_byte_level:
            tokens = {byte: character for character, byte in BYTE_OF_CHARACTER.items()}
        else:
            tokens = {byte: f"<0x{byte:02X}>" for byte in range(256)}
        return bytes(byte for byte, token in tokens.items() if self.backend.token_to_id(token) is None)

    @cached_property
    def _is_byte_level(self) -> bool:
        return _kind(self.backend.decoder) == "ByteLevel"

    def _piece_bytes(self, token: str) -> bytes:
        if self._is_byte_level:
            return bytes(BYTE_OF_CHARACTER[character] for character in token)
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return bytes.fromhex(token[3:5])
        return token.replace(SPACE_MARK, " ").encode()


def enclose(backend: Backend, bos: str | None, eos: str | None) -> None:
    """Puts `bos` before and `eos` after each text that is encoded with special tokens, and nothing else."""
    parts = [part for part in (bos, "$A", eos) if part is not None]
    ids = [(token, backend.token_to_id(token)) for token in (bos, eos) if token is not None]
    backend.post_processor = TemplateProcessing(single=parts, pair=[*parts, "$B"], special_tokens=ids)


def _kind(component: Normalizer | Decoder | None) -> str | None:
    """The type of a component of `tokenizers`, for a sequence the joined types of its parts."""
    if component is None:
        return None
    # The state of a component is its part of tokenizer.json.
    state = json.loads(str(component.__getstate__(), "utf-8"))
    if state["type"] == "Sequence":
        parts = state.get("normalizers") or state.get("decoders") or []
        return "+".join(str(part["type"]) for part in parts)
    return str(state["type"])


_SHRINK_OF_NORMALIZER = {None: 1, "": 1, "NFC": _MAX_NFC_SHRINK, "Replace": 1, "Prepend+Replace": 1}
