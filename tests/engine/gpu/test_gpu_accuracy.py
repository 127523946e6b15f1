"""Real weights in bfloat16: as close to a float32 forward as transformers is, and the same greedy text but for ties.

Two tokens are tied where transformers' bfloat16 logits have them within two units of the last place. What float32 makes of
them is reported beside that: how far apart it has them, and what transformers' bfloat16 misses it by at that position.
"""

from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, fields, replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

import triode
from engines import greedy
from gpu_proofs import Record
from transformers_llama import in_transformers
from triode.engine.engine import Engine
from triode.models.config import ModelOptions
from triode.models.loader import Checkpoint, open_checkpoint
from triode.models.weights import DecoderWeights

MODEL = "smollm2-135m"
WINDOW_TOKENS = 512
MOST_ULP = 2
TEXT = Path(__file__).parents[3] / "LICENSE"
PROMPTS = [
    "The quick brown fox",
    "Once upon a time, in a village by the river, there lived",
    "import numpy as np\n\ndef softmax(x):\n",
    "#include <stdio.h>\nint main(void) {\n    printf(",
    "1, 1, 2, 3, 5, 8, 13,",
    "SELECT name, COUNT(*) FROM users WHERE",
    "To be, or not to be, that is",
    "E = mc² is the formula which",
    '{"name": "Alice", "age": ',
    "Water boils at",
    "The capital of France is",
    "The three primary colours are",
    "A spider has",
    "The Pythagorean theorem states that",
    "In 1969, astronauts",
    "def fibonacci(n):\n",
    "Dear Sir or Madam,\n\nI am writing to",
    "Photosynthesis is the process by which",
    "The largest planet in the solar system is",
    "First, preheat the oven to",
]


@dataclass(frozen=True)
class Place:
    """Where the proof runs, and how much of it."""

    device: str
    num_windows: int
    num_prompts: int
    num_new: int
    least_equal: float
    """Of the prompts, how many are continued as transformers continues them."""

    def open(self) -> AbstractAsyncContextManager[Engine]:
        return triode.open_engine(
            MODEL,
            device=self.device,
            dtype="bfloat16",
            executor="thread",
            kv_cache_bytes=2**28,
            max_context_tokens=1024,
        )


places = pytest.mark.parametrize(
    "place",
    [
        pytest.param(Place("cpu", 2, 5, 16, 0.6), id="in small on the CPU", marks=pytest.mark.slow),
        pytest.param(Place("cuda", 4, 20, 48, 0.9), id="GPU", marks=pytest.mark.gpu),
    ],
)


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return open_checkpoint(ModelOptions(model=MODEL, max_context_tokens=1024))


def transformers_model(checkpoint: Checkpoint, device: str) -> LlamaForCausalLM:
    return in_transformers(checkpoint.config, checkpoint.load_weights(torch.bfloat16, torch.device(device)))


def exact_model(checkpoint: Checkpoint) -> LlamaForCausalLM:
    """The same bfloat16 weights, computed with in float32."""
    weights = checkpoint.load_weights(torch.bfloat16, torch.device("cpu"))
    layers = tuple(
        replace(
            layer,
            **{
                field.name: tensor.float()
                for field in fields(layer)
                if (tensor := getattr(layer, field.name)) is not None
            },
        )
        for layer in weights.layers
    )
    embed_VD = weights.embed_VD.float()
    return in_transformers(checkpoint.config, DecoderWeights(embed_VD, layers, weights.final_norm_D.float(), embed_VD))


def judged(model: LlamaForCausalLM, window: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """The logprob of each next token, and the most probable one instead of it."""
    with torch.inference_mode():
        logits_TV = model(torch.tensor([window], device=model.device)).logits[0, :-1].float().cpu()
    logprobs_TV = logits_TV.log_softmax(-1)
    return logprobs_TV.gather(1, torch.tensor(window[1:])[:, None])[:, 0], logits_TV.argmax(-1)


async def judged_by_engine(engine: Engine, window: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    async with engine.submit(window, greedy(1, prompt_logprobs=1)) as stream:
        scores = (await stream.result()).prompt_logprobs
    assert scores is not None
    return torch.tensor([score.logprob for score in scores]), torch.tensor([score.top_ids[0] for score in scores])


@places
async def test_bfloat16_is_as_close_to_float32_as_in_transformers(
    place: Place, checkpoint: Checkpoint, record_property: Record
) -> None:
    token_ids = checkpoint.tokenizer.encode(TEXT.read_text())
    windows = [token_ids[index * WINDOW_TOKENS :][:WINDOW_TOKENS] for index in range(place.num_windows)]
    exact, theirs = exact_model(checkpoint), transformers_model(checkpoint, place.device)
    async with place.open() as engine:
        rows = [
            (judged(exact, window), await judged_by_engine(engine, window), judged(theirs, window))
            for window in windows
        ]
    wanted, ours, other = [
        [torch.cat(parts) for parts in zip(*column, strict=True)] for column in zip(*rows, strict=True)
    ]
    errors, equals = [], []
    for name, (logprobs, best) in {"Triode": ours, "transformers": other}.items():
        errors.append(float((logprobs - wanted[0]).norm() / wanted[0].norm()))
        equals.append(int((best == wanted[1]).sum()))
        record_property(name, f"relative error {errors[-1]:.2e}, best token equal at {equals[-1]} of {len(best)}")
    assert errors[0] < 1.1 * errors[1] < 0.1
    assert equals[0] >= equals[1]


@dataclass(frozen=True)
class Tie:
    """Two tokens after the same prefix, of which bfloat16 took one in Triode and the other in transformers."""

    margin: float
    """How much further up the exact logits have transformers' token."""
    error: float
    """What transformers' own bfloat16 misses the exact logits of this position by, at most."""
    ulp: float
    """How far apart transformers sees them, in units of its bfloat16 logits' last place."""

    @classmethod
    def between(
        cls, exact: LlamaForCausalLM, theirs: LlamaForCausalLM, prefix: list[int], our: int, their: int
    ) -> "Tie":
        exact_V, their_V = (next_logits(model, prefix) for model in (exact, theirs))
        _, exponent = torch.frexp(their_V[their].abs())
        return cls(
            margin=float(exact_V[their] - exact_V[our]),
            error=float((their_V - exact_V).abs().max()),
            ulp=float((their_V[their] - their_V[our]).abs() / 2.0 ** (float(exponent) - 8)),
        )


def next_logits(model: LlamaForCausalLM, prefix: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        logits_V: torch.Tensor = model(torch.tensor([prefix], device=model.device)).logits[0, -1]
    return logits_V.float().cpu()


@places
async def test_greedy_text_is_that_of_transformers_but_for_ties(
    place: Place, checkpoint: Checkpoint, record_property: Record
) -> None:
    exact, theirs = exact_model(checkpoint), transformers_model(checkpoint, place.device)
    prompts = [checkpoint.tokenizer.encode(prompt) for prompt in PROMPTS[: place.num_prompts]]
    async with place.open() as engine:
        results = [(await engine.generate([prompt], greedy(place.num_new)))[0] for prompt in prompts]
    ties = []
    for prompt, result in zip(prompts, results, strict=True):
        ours: list[int] = [*result.completion.token_ids]
        expected = continued(theirs, prompt, place.num_new)
        pairs = enumerate(zip(ours, expected, strict=True))
        if first := next(((index, *pair) for index, pair in pairs if pair[0] != pair[1]), None):
            index, our, their = first
            ties.append(Tie.between(exact, theirs, prompt + ours[:index], our, their))
            record_property(f"differs after {index} tokens", ties[-1])
    num_equal = len(prompts) - len(ties)
    record_property("equal", f"{num_equal} of {len(prompts)}")
    assert all(tie.ulp <= MOST_ULP for tie in ties)
    assert num_equal >= place.least_equal * len(prompts)


def continued(model: LlamaForCausalLM, prompt: list[int], num_new: int) -> list[int]:
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    ids = torch.tensor([prompt], device=model.device)
    with torch.inference_mode():
        output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_new, do_sample=False)
    new: list[int] = output[0, len(prompt) :].tolist()
    return new
