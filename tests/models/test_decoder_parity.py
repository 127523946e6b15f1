"""Tiny random models of every architecture against transformers, through their files and a paged cache."""

import random
import warnings
from pathlib import Path

import pytest
import torch
import transformers

from native_steps import native_decoder
from paged_decoding import PagedDecoding, PagedSequence
from triode.kernels.dispatch import choose_kernels
from triode.models.decoder import Decoder
from triode.models.hf_config import read_config
from triode.models.program import StepProgram
from triode.models.progress import NullProgress
from triode.models.safetensors import SafetensorsFolder
from triode.models.tensors import load_weights

CPU = torch.device("cpu")
SIZES: dict[str, object] = {
    "vocab_size": 199,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.25,
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONGROPE = {"rope_type": "longrope", "factor": 8.0, "short_factor": [1.0] * 4, "long_factor": [1.0, 1.5, 4.0, 9.0]}


def rope(original: int | None = None, **values: object) -> dict[str, object]:
    extra = {} if original is None else {"original_max_position_embeddings": original}
    return {"rope_parameters": {"rope_theta": 10_000.0, **values, **extra}}


MODELS: dict[str, tuple[str, dict[str, object]]] = {
    "llama": ("Llama", {}),
    "llama tied": ("Llama", {"tie_word_embeddings": True}),
    "llama biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama wide heads": ("Llama", {"head_dim": 16}),
    "llama one kv head": ("Llama", {"num_key_value_heads": 1}),
    "llama no groups": ("Llama", {"num_key_value_heads": 6}),
    "mistral window": ("Mistral", {"sliding_window": 7}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {}),
    "qwen2 window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "linear": ("Llama", rope(rope_type="linear", factor=4.0)),
    "dynamic": ("Llama", rope(rope_type="dynamic", factor=4.0)),
    "llama3": ("Llama", rope(original=32, **LLAMA3)),
    "yarn": ("Qwen2", rope(original=64, rope_type="yarn", factor=4.0)),
    "longrope": ("Llama", rope(original=4, **LONGROPE)),
}


class Pair:
    """The same model twice: transformers' and ours, read from the files that transformers wrote."""

    def __init__(self, name: str, folder: Path) -> None:
        family, changes = MODELS[name]
        torch.manual_seed(len(name))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = getattr(transformers, f"{family}Config")(**(SIZES | changes))
            self.theirs = getattr(transformers, f"{family}ForCausalLM")(config).eval()
            for name_, parameter in self.theirs.named_parameters():
                if name_.endswith("bias") or "norm" in name_:
                    torch.nn.init.uniform_(parameter, 0.5, 1.5)
            self.theirs.save_pretrained(folder)
        self.config = read_config(folder)
        self.weights = load_weights(self.config, SafetensorsFolder(folder), torch.float32, CPU, NullProgress())

    def ours(self, kernels: str) -> StepProgram:
        if kernels == "native":
            return native_decoder(self.config, self.weights)
        return Decoder(self.config, self.weights, choose_kernels(CPU, torch.float32))

    @torch.inference_mode()
    def expected_logits(self, token_ids: list[int]) -> torch.Tensor:
        logits: torch.Tensor = self.theirs(torch.tensor([token_ids])).logits[0]
        return logits


@pytest.fixture(params=MODELS)
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> Pair:
    return Pair(request.param, tmp_path)


@pytest.mark.parametrize("kernels", ["torch", "native"])
def test_logits_and_greedy_tokens_are_those_of_transformers(pair: Pair, kernels: str) -> None:
    """Ragged prompts in ragged chunks, prefill beside decode; 64 tokens each.

    Where transformers' best token after every prefix of our text is our next one, its greedy text is ours.
    """
    rng = random.Random(7)
    decoding = PagedDecoding(pair.ours(kernels), num_blocks=60)
    num_prompt = (5, 37, 90, 17)
    sequences = [PagedSequence([rng.randrange(199) for _ in range(count)]) for count in num_prompt]
    logits: list[list[torch.Tensor]] = [[] for _ in sequences]
    targets = [count + 64 for count in num_prompt]
    while running := [row for row, sequence in enumerate(sequences) if sequence.num_computed < targets[row]]:
        counts = [min(len(s.token_ids) - s.num_computed, rng.choice((3, 16, 64))) for s in sequences]
        outputs = decoding.step([(sequences[row], counts[row]) for row in running])
        for row, output in zip(running, outputs, strict=True):
            logits[row].append(output)
            if sequences[row].num_computed == len(sequences[row].token_ids):
                sequences[row].token_ids.append(int(output[-1].argmax()))
    for sequence, rows, count in zip(sequences, logits, num_prompt, strict=True):
        expected = pair.expected_logits(sequence.token_ids[:-1])
        torch.testing.assert_close(torch.cat(rows), expected, rtol=0, atol=1e-4)
        assert expected.argmax(-1)[count - 1 :].tolist() == sequence.token_ids[count:]
