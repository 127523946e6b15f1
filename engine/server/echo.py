"""The `echo` of text completions: the prompt before the output, with its own logprobs if they are asked for."""

from collections.abc import Sequence

import msgspec

from triode.engine.request import Prompt
from triode.engine.server.errors import engine_error, wrong_value
from triode.engine.server.logprobs import text_logprobs, token_text
from triode.engine.server.openai_responses import TextLogprobs
from triode.engine.server.service import Service
from triode.errors import TriodeError
from triode.ids import TokenId
from triode.models.step import TokenLogprobs
from triode.models.tokenizer import Tokenizer


class Echo(msgspec.Struct, frozen=True):
    """One prompt."""

    text: str
    token_ids: tuple[TokenId, ...]


async def echo_of(service: Service, prompt: Prompt) -> Echo:
    """A prompt as it is repeated: a text as it was given, tokens as their text.

    Raises:
        RequestError: 400 if it cannot be a prompt, 503 if the engine has ended.
    """
    try:
        token_ids = await service.engine.encode(prompt)
    except ValueError as error:
        raise wrong_value(error) from None
    except TriodeError as error:
        raise engine_error(error) from error
    text = prompt if isinstance(prompt, str) else service.tokenizer.decode(token_ids, skip_special_tokens=False)
    return Echo(text, token_ids)


def with_prompt(
    tokenizer: Tokenizer,
    echo: Echo,
    prompt: Sequence[TokenLogprobs],
    output: Sequence[TokenLogprobs],
    num_alternatives: int,
) -> TextLogprobs:
    """Logprobs of prompt and output in one list. The first token has nothing to be predicted from."""
    first = token_text(tokenizer, echo.token_ids[0])
    tops = [_with(entry, num_alternatives) for entry in prompt]
    rest = text_logprobs(tokenizer, [*tops, *output], len(first))
    return TextLogprobs(
        text_offset=[0, *rest.text_offset],
        token_logprobs=[None, *rest.token_logprobs],
        tokens=[first, *rest.tokens],
        top_logprobs=[None, *rest.top_logprobs],
    )


def _with(entry: TokenLogprobs, num_alternatives: int) -> TokenLogprobs:
    """The prompt may have been scored with more alternatives than the echo is to have."""
    return msgspec.structs.replace(
        entry, top_ids=entry.top_ids[:num_alternatives], top_logprobs=entry.top_logprobs[:num_alternatives]
    )
