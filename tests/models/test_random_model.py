import math

import pytest
import torch

from triode.errors import ModelNotFound
from triode.models.config import ModelOptions
from triode.models.loader import open_checkpoint
from triode.models.progress import NullProgress
from triode.models.random_model import RANDOM_NAMES, RandomTensors, random_config
from triode.models.tensors import load_weights
from triode.models.weights import places

CPU = torch.device("cpu")


def load(name: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    config = random_config(name)
    return dict(places(config, load_weights(config, RandomTensors(config, seed), dtype, CPU, NullProgress())))


def test_a_seed_gives_the_same_weights_and_another_seed_others() -> None:
    first, again, other = load("tiny"), load("tiny"), load("tiny", seed=1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)


def test_no_two_tensors_or_rows_are_equal() -> None:
    tensors = load("tiny-qwen2")
    values = [tuple(tensor.flatten()[:16].tolist()) for tensor in tensors.values()]
    assert len(set(values)) == len(values)
    embed_VD = tensors["model.embed_tokens.weight"]
    assert len(set(map(tuple, embed_VD.tolist()))) == len(embed_VD)


def test_matrices_keep_the_size_of_their_input_and_norms_are_near_one() -> None:
    for name, tensor in load("tiny-llama").items():
        if tensor.ndim == 2:
            assert tensor.std() * tensor.shape[1] ** 0.5 == pytest.approx(1, rel=0.05), name
        assert tensor.mean() == pytest.approx(1 if "norm" in name else 0, abs=0.1), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes_are_roundings_of_the_same_numbers(dtype: torch.dtype) -> None:
    exact, rounded = load("tiny"), load("tiny", dtype=dtype)
    assert all(torch.allclose(exact[name], rounded[name].float(), rtol=2e-2, atol=1e-6) for name in exact)


@pytest.mark.parametrize("name", RANDOM_NAMES)
def test_every_random_model_holds_the_tokens_of_its_tokenizer(name: str) -> None:
    config = random_config(name)
    assert config.vocab_size >= 49_152
    assert (config.bos_token_id, config.eos_token_ids) == (1, (2,))


def test_the_published_shapes_have_the_published_sizes() -> None:
    sizes = {"qwen2.5-0.5b": 0.494e9, "qwen2.5-7b": 7.616e9, "llama-3.1-8b": 8.03e9, "smollm2-135m": 0.1345e9}
    for name, num_parameters in sizes.items():
        total = sum(math.prod(shape) for shape in RandomTensors(random_config(name), 0).shapes.values())
        assert total == pytest.approx(num_parameters, rel=0.005)


def test_the_seed_of_the_options_reaches_the_weights() -> None:
    checkpoint = open_checkpoint(ModelOptions(model="random:tiny", weights_seed=5))
    assert torch.equal(
        checkpoint.load_weights(torch.float32, CPU).final_norm_D, load("tiny", seed=5)["model.norm.weight"]
    )


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ModelNotFound, match="there is no random model 'gpt-9'; there are tiny, "):
        open_checkpoint(ModelOptions(model="random:gpt-9"))
