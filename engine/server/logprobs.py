"""Log-probabilities in the shapes of OpenAI's chat and text completions, and of vLLM's prompts."""

from collections.abc import Sequence

from triode.engine.server.openai_responses import (
    ChatLogprob,
    ChatLogprobs,
    PromptLogprob,
    PromptLogprobs,
    TextLogprobs,
    TopLogprob,
)
from triode.ids import TokenId
from triode.models.step import TokenLogprobs
from triode.models.tokenizer import Tokenizer


def token_text(tokenizer: Tokenizer, token_id: TokenId) -> str:
    """A token by itself; bytes that are no whole character become U+FFFD."""
    return tokenizer.token_bytes(token_id).decode(errors="replace")


def chat_logprobs(tokenizer: Tokenizer, tokens: Sequence[TokenLogprobs]) -> ChatLogprobs:
    """The tokens of one chunk or reply."""

    def top(token_id: TokenId, logprob: float) -> TopLogprob:
        data = tokenizer.token_bytes(token_id)
        return TopLogprob(data.decode(errors="replace"), logprob, list(data))

    content = []
    for token in tokens:
        taken = top(token.token_id, token.logprob)
        others = [top(*pair) for pair in zip(token.top_ids, token.top_logprobs, strict=True)]
        content.append(ChatLogprob(taken.token, taken.logprob, taken.bytes, top_logprobs=others))
    return ChatLogprobs(content)


def text_logprobs(tokenizer: Tokenizer, tokens: Sequence[TokenLogprobs], offset: int) -> TextLogprobs:
    """The same; `offset` is where these tokens begin in the output, counted in characters of tokens."""
    texts = [token_text(tokenizer, token.token_id) for token in tokens]
    offsets = []
    for text in texts:
        offsets.append(offset)
        offset += len(text)
    return TextLogprobs(
        text_offset=offsets,
        token_logprobs=[token.logprob for token in tokens],
        tokens=texts,
        top_logprobs=[
            {
                token_text(tokenizer, top_id): value
                for top_id, value in zip(token.top_ids, token.top_logprobs, strict=True)
            }
            for token in tokens
        ],
    )


def prompt_logprobs(tokenizer: Tokenizer, tokens: Sequence[TokenLogprobs]) -> PromptLogprobs:
    """By position: the prompt's token and the most probable ones."""
    positions: PromptLogprobs = [None]
    for token in tokens:
        tops = zip(token.top_ids, token.top_logprobs, strict=True)
        found = {
            top_id: PromptLogprob(value, rank, token_text(tokenizer, top_id))
            for rank, (top_id, value) in enumerate(tops, start=1)
        }
        found[token.token_id] = PromptLogprob(token.logprob, token.rank, token_text(tokenizer, token.token_id))
        positions.append(found)
    return positions
