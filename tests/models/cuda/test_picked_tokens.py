"""How many tokens go through how much of the last layer: products by their numbers of tokens. Nothing is computed."""

from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("triton")

from triton.runtime.jit import JITFunction

from absent_world import LONG_TOKENS, MAX_LAYERS, AbsentWorld
from cross_compile import HOPPER
from runner_world import Running
from triode.models.cuda import linears
from triode.models.random_model import random_config
from triode.models.sampling import SamplingParams
from triode.models.step import Output

MODEL = "qwen2.5-7b"
CONFIG = random_config(MODEL)
KV = 2 * CONFIG.kv_size
QKV = CONFIG.q_size + KV
HEAD = CONFIG.vocab_size


class CountedProducts(AbsentWorld):
    """A runner on a GPU that is not there, and of each product the out features and the tokens."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.products: list[tuple[int, int]] = []

        def counted(
            x_MK: torch.Tensor, weight_NK: torch.Tensor, out_MN: torch.Tensor, *_: object, **__: object
        ) -> None:
            # Kernels are chosen by strides, too: what runs is what was proved.
            assert x_MK.is_contiguous()
            assert out_MN.is_contiguous()
            self.products.append((len(weight_NK), len(x_MK)))

        monkeypatch.setattr(JITFunction, "run", lambda *_, **__: None)
        monkeypatch.setattr(linears, "linear_sequential", counted)
        monkeypatch.setattr(linears, "linear_blas", counted)
        monkeypatch.setattr("triode.models.cuda.layer.qkv_fused", counted)
        super().__init__(MODEL, torch.bfloat16, HOPPER)

    def of(self, *rows: tuple[Running, int, Output]) -> list[tuple[int, int]]:
        """The products of a step."""
        self.products.clear()
        self.runner.launch(self.plan(*rows))
        return self.products


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[CountedProducts]:
    with torch.inference_mode():
        yield CountedProducts(monkeypatch)


def layers(*, whole: int, picked: int) -> list[tuple[int, int]]:
    """Products of a step of so many tokens, of which so many go on behind the last layer's keys and values."""

    def layer(num_tokens: int) -> list[tuple[int, int]]:
        out_features = (QKV, CONFIG.hidden_size, 2 * CONFIG.intermediate_size, CONFIG.hidden_size)
        return [(features, num_tokens) for features in out_features]

    products = layer(whole) * (MAX_LAYERS - 1) + [(KV, whole)]
    return products + layer(picked) + [(HEAD, picked)] if picked else products


def test_of_a_prompt_only_the_last_token_goes_through_all_of_the_last_layer(world: CountedProducts) -> None:
    running = world.admit(0, [1] * LONG_TOKENS)
    assert world.of((running, LONG_TOKENS, Output.SAMPLE)) == layers(whole=LONG_TOKENS, picked=1)


def test_of_a_step_of_fixed_shape_a_token_for_each_row_does(world: CountedProducts) -> None:
    rows = [world.admit(slot, [1] * 300) for slot in range(3)]
    assert world.of(*[(row, 300, Output.SAMPLE) for row in rows]) == layers(whole=1024, picked=4)


def test_beside_decoding_rows_their_tokens_do(world: CountedProducts) -> None:
    rows = [world.admit(slot, [1] * 2) for slot in range(20)]
    reader = world.admit(20, [1] * 3000)
    steps = [(row, 1, Output.SAMPLE) for row in rows]
    for row in rows:
        row.num_computed = 1
    assert world.of(*steps, (reader, 2000, Output.NONE)) == layers(whole=2020, picked=20)


@pytest.mark.parametrize(("num_tokens", "padded"), [(2000, 2000), (300, 384)])
def test_a_chunk_of_which_nothing_is_sampled_leaves_keys_and_values_alone(
    world: CountedProducts, num_tokens: int, padded: int
) -> None:
    running = world.admit(0, [1] * 3000)
    assert world.of((running, num_tokens, Output.NONE)) == layers(whole=padded, picked=0)


@pytest.mark.parametrize("output", [Output.HIDDEN, Output.PROMPT_LOGPROBS])
def test_rows_whose_hidden_states_are_read_keep_all_tokens(
    world: CountedProducts, monkeypatch: pytest.MonkeyPatch, output: Output
) -> None:
    monkeypatch.setattr("triode.models.cuda.runner.score_prompts", lambda *_: None)
    monkeypatch.setattr("triode.models.cuda.hidden.Embeddings.add", lambda *_: None)
    running = world.admit(0, [1] * 300, SamplingParams(prompt_logprobs=0))
    beside = world.admit(1, [1] * 200)
    products = world.of((running, 300, output), (beside, 200, Output.SAMPLE))
    assert (KV, 500) not in products
    assert products.count((QKV, 500)) == MAX_LAYERS
    assert products[-1] == (HEAD, 1)


@pytest.mark.parametrize("num_rows", [1, 2, 65])
def test_a_decode_step_picks_nothing(world: CountedProducts, monkeypatch: pytest.MonkeyPatch, num_rows: int) -> None:
    monkeypatch.delattr("triode.models.cuda.decoder.pick")
    rows = [world.admit(slot, [1]) for slot in range(num_rows)]
    products = world.of(*[(row, 1, Output.SAMPLE) for row in rows])
    assert KV not in dict(products)
