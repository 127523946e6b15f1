"""Real weights in bfloat16: as close to a float32 forward as transformers is, and the same greedy text but for ties."""

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
TEXT = Path(__file__).parents[3] / "LICENSE"
MOST_ULP = 2
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


def tie_ulp(model: LlamaForCausalLM, prefix: list[int], first: int, second: int) -> float:
    """How far apart transformers sees two tokens after a prefix, in units of its bfloat16 logits' last place."""
    with torch.inference_mode():
        logits_V = model(torch.tensor([prefix], device=model.device)).logits[0, -1].float()
    _, exponent = torch.frexp(logits_V[first].abs())
    return float((logits_V[first] - logits_V[second]).abs() / 2.0 ** (float(exponent) - 8))


@places
async def test_greedy_text_is_that_of_transformers_but_for_ties(
    place: Place, checkpoint: Checkpoint, record_property: Record
) -> None:
    theirs = transformers_model(checkpoint, place.device)
    prompts = [checkpoint.tokenizer.encode(prompt) for prompt in PROMPTS[: place.num_prompts]]
    async with place.open() as engine:
        results = [(await engine.generate([prompt], greedy(place.num_new)))[0] for prompt in prompts]
    num_equal = 0
    for prompt, result in zip(prompts, results, strict=True):
        ours: list[int] = [*result.completion.token_ids]
        expected = continued(theirs, prompt, place.num_new)
        num_equal += ours == expected
        for index, (our, their) in enumerate(zip(ours, expected, strict=True)):
            if our != their:
                ulp = tie_ulp(theirs, prompt + ours[:index], their, our)
                record_property(f"differs after {index} tokens", f"tie within {ulp:g} ulp")
                assert ulp <= MOST_ULP
                break
    record_property("equal", f"{num_equal} of {len(prompts)}")
    assert num_equal >= place.least_equal * len(prompts)


def continued(model: LlamaForCausalLM, prompt: list[int], num_new: int) -> list[int]:
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    ids = torch.tensor([prompt], device=model.device)
    with torch.inference_mode():
        output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_new, do_sample=False)
    new: list[int] = output[0, len(prompt) :].tolist()
    return new
