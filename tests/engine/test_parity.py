"""SmolLM2 through all five actors, against transformers: the same tokens."""

from collections.abc import Sequence

import pytest
import torch

import triode
from engines import greedy
from transformers_llama import in_transformers
from triode.engine.request import Prompt
from triode.models.config import KernelChoice, ModelOptions
from triode.models.loader import open_checkpoint
from triode.models.tokenizer import Tokenizer

MODEL = "smollm2-135m"
FRANCE = "What is the capital of France? Explain briefly."
PROMPTS: list[Prompt] = [
    [{"role": "user", "content": FRANCE}],
    [{"role": "user", "content": "Write a haiku about the sea."}],
    [{"role": "system", "content": "You are terse."}, {"role": "user", "content": "Name three primes."}],
    [{"role": "user", "content": "法国的首都是哪里？请简要说明。"}],
    [{"role": "user", "content": "What does 👍🏽 mean? And 🇫🇷?"}],
    [{"role": "user", "content": "Write a Python function that reverses a list."}],
    [
        {"role": "user", "content": "I am Ada."},
        {"role": "assistant", "content": "Hello Ada! How can I help?"},
        {"role": "user", "content": "What is my name?"},
    ],
    [{"role": "user", "content": "Translate to French: The cat sleeps on the mat."}],
    "The capital of France is",
    "Once upon a time, in a village by the sea, there lived",
    "Q: What is 12 + 30?\nA:",
    "北京是中国的首都，",
    "从前有一座山，山里有一座庙，",
    "def fibonacci(n):\n    ",
    "#include <stdio.h>\n\nint main(void) {\n",
    "SELECT name, age FROM users WHERE",
    "🎉🎂 Happy birthday",
    "Être ou ne pas être, telle est",
    "1, 1, 2, 3, 5, 8, 13,",
    "<html>\n  <head>\n    <title>",
    " ".join(["The rain in Spain stays mainly in the plain."] * 9),
    "A",
]


class Oracle:
    """What transformers would have said."""

    def __init__(self) -> None:
        checkpoint = open_checkpoint(ModelOptions(model=MODEL))
        self.tokenizer: Tokenizer = checkpoint.tokenizer
        weights = checkpoint.load_weights(torch.float32, torch.device("cpu"))
        self._model = in_transformers(checkpoint.config, weights)
        self._eos = checkpoint.config.eos_token_ids

    def encode(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt)
        text = self.tokenizer.apply_chat_template(prompt)  # type: ignore[arg-type]  # the others are messages
        return self.tokenizer.encode(text, add_special_tokens=False)

    def agrees(self, prompt: Prompt, output: Sequence[int]) -> list[int]:
        """What it would have taken at each place of `output`, given all that stands before.

        When that is `output` itself, greedy generation yields `output`.
        """
        prompt_ids = self.encode(prompt)
        with torch.inference_mode():
            logits_TV = self._model(torch.tensor([[*prompt_ids, *output]])).logits[0]
        chosen: list[int] = logits_TV[len(prompt_ids) - 1 : -1].argmax(-1).tolist()
        return chosen

    def generate(self, prompt: Prompt, max_tokens: int) -> list[int]:
        """Greedy generation with transformers' own loop and cache."""
        ids = torch.tensor([self.encode(prompt)])
        options = {"do_sample": False, "eos_token_id": list(self._eos), "pad_token_id": self._eos[0]}
        output = self._model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, **options)
        generated: list[int] = output[0, ids.shape[1] :].tolist()
        return generated


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    return Oracle()


async def outputs(
    max_tokens: int, kv_cache_bytes: int, kernels: KernelChoice = "auto", *, is_scarce: bool = False
) -> list[tuple[int, ...]]:
    """All prompts at once, twice: cold, and with the prefix cache full of them. Prompts are cut into chunks."""
    async with triode.open_engine(
        MODEL,
        dtype="float32",
        max_running=32,
        max_step_tokens=80,
        max_context_tokens=512,
        kv_cache_bytes=kv_cache_bytes,
        kernels=kernels,
    ) as engine:
        params = greedy(max_tokens, ignore_eos=False)
        cold = await engine.generate(PROMPTS, params)
        warm = await engine.generate(PROMPTS[:4], params)
        assert [result.completion.token_ids for result in warm] == [result.completion.token_ids for result in cold[:4]]
        assert any(result.usage.cached_tokens for result in warm)
        assert is_scarce == (engine.statistics().scheduler.num_preemptions > 0)
        return [result.completion.token_ids for result in cold]


async def test_greedy_tokens_are_those_of_transformers(oracle: Oracle) -> None:
    assert len(PROMPTS) >= 20
    for prompt, output in zip(PROMPTS, await outputs(8, 2**27), strict=True):
        assert list(output) == oracle.agrees(prompt, output)


@pytest.mark.slow
@pytest.mark.parametrize("kernels", ["auto", "reference"])
async def test_sixty_four_greedy_tokens_are_those_of_transformers(oracle: Oracle, kernels: KernelChoice) -> None:
    # The smaller cache holds about half of what the prompts and their outputs take: requests are preempted.
    plenty = await outputs(64, 2**28, kernels)
    scarce = await outputs(64, 2**26, kernels, is_scarce=True)
    assert plenty == scarce
    for prompt, output in zip(PROMPTS, plenty, strict=True):
        assert list(output) == oracle.agrees(prompt, output)


@pytest.mark.slow
async def test_the_oracle_generates_what_it_agrees_with(oracle: Oracle) -> None:
    for prompt in PROMPTS[:4]:
        output = oracle.generate(prompt, 16)
        assert oracle.agrees(prompt, output) == output
