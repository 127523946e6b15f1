"""Real weights in 16 bits: as close to a float32 forward as transformers is, and the same greedy text but for ties.

Two tokens are tied where transformers' 16-bit logits have them within two units of the last place. What float32 makes of
them is reported beside that: how far apart it has them, and what transformers in 16 bits misses it by at that position.
So is how often transformers continues the prompts as it does itself when nothing changes but the order of its sums.
"""

from collections.abc import Callable
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

    def open(self, dtype: torch.dtype) -> AbstractAsyncContextManager[Engine]:
        return triode.open_engine(
            MODEL,
            device=self.device,
            dtype=named(dtype),
            executor="thread",
            kv_cache_bytes=2**28,
            max_context_tokens=1024,
        )


def named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=named)
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


@dataclass(frozen=True)
class Oracles:
    """transformers around one set of weights, each with roundings of its own."""

    exact: LlamaForCausalLM
    """The same weights, computed with in float32."""
    theirs: LlamaForCausalLM
    fused: LlamaForCausalLM
    """The same but for torch's fused attention, which adds in another order."""

    @classmethod
    def of(cls, checkpoint: Checkpoint, dtype: torch.dtype, device: str, exact_device: str) -> "Oracles":
        weights = checkpoint.load_weights(dtype, torch.device(device))
        exact = changed(weights, lambda tensor: tensor.to(exact_device, torch.float32))
        return cls(
            exact=in_transformers(checkpoint.config, exact),
            theirs=in_transformers(checkpoint.config, weights),
            fused=in_transformers(checkpoint.config, weights, "sdpa"),
        )


def changed(weights: DecoderWeights, change: Callable[[torch.Tensor], torch.Tensor]) -> DecoderWeights:
    """Each tensor of weights whose head is the embedding."""
    layers = tuple(
        replace(
            layer,
            **{
                field.name: change(tensor)
                for field in fields(layer)
                if (tensor := getattr(layer, field.name)) is not None
            },
        )
        for layer in weights.layers
    )
    embed_VD = change(weights.embed_VD)
    return DecoderWeights(embed_VD, layers, change(weights.final_norm_D), embed_VD)


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


LEAST_BEST = {torch.float16: 0.995}
"""At how much of the positions the best token is that of float32. bfloat16, whose roundings are eight times as large, has to
find it as often as transformers does instead."""


@dtypes
@places
async def test_logits_are_as_close_to_float32_as_in_transformers(
    place: Place, dtype: torch.dtype, checkpoint: Checkpoint, record_property: Record
) -> None:
    token_ids = checkpoint.tokenizer.encode(TEXT.read_text())
    windows = [token_ids[index * WINDOW_TOKENS :][:WINDOW_TOKENS] for index in range(place.num_windows)]
    oracles = Oracles.of(checkpoint, dtype, place.device, exact_device="cpu")
    async with place.open(dtype) as engine:
        rows = [
            (
                judged(oracles.exact, window),
                await judged_by_engine(engine, window),
                judged(oracles.theirs, window),
                judged(oracles.fused, window),
            )
            for window in windows
        ]
    wanted, ours, other, other_fused = [
        [torch.cat(parts) for parts in zip(*column, strict=True)] for column in zip(*rows, strict=True)
    ]
    between = int((other[1] == other_fused[1]).sum())
    record_property("transformers and itself with torch's fused attention", f"best token equal at {between}")
    errors, equals = [], []
    for name, (logprobs, best) in {"Triode": ours, "transformers": other}.items():
        errors.append(float((logprobs - wanted[0]).norm() / wanted[0].norm()))
        equals.append(int((best == wanted[1]).sum()))
        record_property(name, f"relative error {errors[-1]:.2e}, best token equal at {equals[-1]} of {len(best)}")
    assert errors[0] < 1.1 * errors[1] < 0.1
    assert equals[0] >= (LEAST_BEST[dtype] * len(wanted[1]) if dtype in LEAST_BEST else equals[1])


@dataclass(frozen=True)
class Tie:
    """Two tokens after the same prefix, of which Triode took one and transformers the other."""

    margin: float
    """How much further up the exact logits have transformers' token."""
    error: float
    """What transformers in 16 bits misses the exact logits of this position by, at most."""
    ulp: float
    """How far apart transformers sees them, in units of its logits' last place."""

    @classmethod
    def between(cls, oracles: Oracles, prefix: list[int], our: int, their: int) -> "Tie":
        exact_V, their_V = (next_logits(model, prefix) for model in (oracles.exact, oracles.theirs))
        _, exponent = torch.frexp(their_V[their].abs())
        unit = torch.finfo(oracles.theirs.dtype).eps * 2.0 ** (float(exponent) - 1)
        return cls(
            margin=float(exact_V[their] - exact_V[our]),
            error=float((their_V - exact_V).abs().max()),
            ulp=float((their_V[their] - their_V[our]).abs() / unit),
        )


def next_logits(model: LlamaForCausalLM, prefix: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        logits_V: torch.Tensor = model(torch.tensor([prefix], device=model.device)).logits[0, -1]
    return logits_V.float().cpu()


@dtypes
@places
async def test_greedy_text_is_that_of_transformers_but_for_ties(
    place: Place, dtype: torch.dtype, checkpoint: Checkpoint, record_property: Record
) -> None:
    oracles = Oracles.of(checkpoint, dtype, place.device, exact_device=place.device)
    prompts = [checkpoint.tokenizer.encode(prompt) for prompt in PROMPTS[: place.num_prompts]]
    async with place.open(dtype) as engine:
        results = [(await engine.generate([prompt], greedy(place.num_new)))[0] for prompt in prompts]
    ours: list[list[int]] = [[*result.completion.token_ids] for result in results]
    expected = one_by_one(oracles.theirs, prompts, place.num_new)
    ties = []
    for prompt, our_ids, their_ids in zip(prompts, ours, expected, strict=True):
        pairs = enumerate(zip(our_ids, their_ids, strict=True))
        if first := next(((index, *pair) for index, pair in pairs if pair[0] != pair[1]), None):
            index, our, their = first
            ties.append(Tie.between(oracles, prompt + our_ids[:index], our, their))
            record_property(f"differs after {index} tokens", ties[-1])
    for name, others in {
        "float32": continued(oracles.exact, prompts, place.num_new),
        "transformers with all prompts in one batch": continued(oracles.theirs, prompts, place.num_new),
        "transformers with torch's fused attention": one_by_one(oracles.fused, prompts, place.num_new),
    }.items():
        record_property(name, f"Triode equal at {equal(ours, others)}, transformers at {equal(expected, others)}")
    num_equal = equal(ours, expected)
    record_property("equal", f"{num_equal} of {len(prompts)}")
    assert num_equal == len(prompts) - len(ties)
    assert all(tie.ulp <= MOST_ULP for tie in ties)
    assert num_equal >= place.least_equal * len(prompts)


def equal(texts: list[list[int]], others: list[list[int]]) -> int:
    return sum(text == other for text, other in zip(texts, others, strict=True))


def one_by_one(model: LlamaForCausalLM, prompts: list[list[int]], num_new: int) -> list[list[int]]:
    return [continued(model, [prompt], num_new)[0] for prompt in prompts]


def continued(model: LlamaForCausalLM, prompts: list[list[int]], num_new: int) -> list[list[int]]:
    """The prompts' greedy continuations in one batch, padded on the left."""
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    with torch.inference_mode():
        output = model.generate(ids, attention_mask=mask, max_new_tokens=num_new, do_sample=False)
    new: list[list[int]] = output[:, longest:].tolist()
    return new
