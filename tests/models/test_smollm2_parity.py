"""SmolLM2 on real prompts: greedy decoding in float32 gives the tokens that transformers gives."""

import warnings

import pytest
import torch
import transformers

from paged_decoding import PagedDecoding, PagedSequence
from triode.kernels.dispatch import choose_kernels
from triode.models.config import ModelConfig, ModelOptions
from triode.models.decoder import Decoder
from triode.models.loader import open_checkpoint
from triode.models.weights import DecoderWeights

NUM_NEW = 24
QUESTIONS = [
    "What is the capital of France? Explain briefly.",
    "Write a haiku about the sea.",
    "How many legs does a spider have?",
    "Translate to Spanish: good morning, my friend.",
    "用中文介绍一下北京。",
    "什么是机器学习？",
    "Explain this: def f(n): return n if n < 2 else f(n - 1) + f(n - 2)",
    "What does 🚀 mean? And 🤷‍♀️?",
    "List three prime numbers greater than 10.",
    "Qu'est-ce que la photosynthèse ?",
]
TEXTS = [
    "The quick brown fox",
    "Once upon a time, in a village by the river, there lived",
    "import numpy as np\n\ndef softmax(x):\n",
    "#include <stdio.h>\nint main(void) {\n    printf(",
    "从前有座山，山里有座庙，",
    "😀😃😄😁",
    "1, 1, 2, 3, 5, 8, 13,",
    "SELECT name, COUNT(*) FROM users WHERE",
    "To be, or not to be, that is",
    "E = mc² is the formula which",
    '{"name": "Alice", "age": ',
    "Water boils at",
]


def in_transformers(config: ModelConfig, weights: DecoderWeights) -> transformers.LlamaForCausalLM:
    """The same weights in transformers' model."""
    settings = transformers.LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        rms_norm_eps=config.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope.theta},
        tie_word_embeddings=True,
    )
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        model = transformers.LlamaForCausalLM(settings).eval()
    state = {"model.embed_tokens.weight": weights.embed_VD, "lm_head.weight": weights.embed_VD}
    state["model.norm.weight"] = weights.final_norm_D
    for index, layer in enumerate(weights.layers):
        q, k, v = layer.qkv_ED.split((config.q_size, config.kv_size, config.kv_size))
        gate, up = layer.gate_up_FD.chunk(2)
        parts = {
            "input_layernorm": layer.input_norm_D,
            "self_attn.q_proj": q,
            "self_attn.k_proj": k,
            "self_attn.v_proj": v,
            "self_attn.o_proj": layer.o_DE,
            "post_attention_layernorm": layer.post_norm_D,
            "mlp.gate_proj": gate,
            "mlp.up_proj": up,
            "mlp.down_proj": layer.down_DF,
        }
        state |= {f"model.layers.{index}.{name}.weight": tensor for name, tensor in parts.items()}
    model.load_state_dict(state, assign=True)
    # Not a parameter: the empty model's is empty too.
    model.model.rotary_emb = type(model.model.rotary_emb)(settings)
    return model


@pytest.mark.slow
def test_real_prompts_are_continued_as_transformers_continues_them() -> None:
    """All prompts in one batch; where transformers' best next token is ours after every prefix, its text is ours."""
    checkpoint = open_checkpoint(ModelOptions(model="smollm2-135m", max_context_tokens=512))
    weights = checkpoint.load_weights(torch.float32, torch.device("cpu"))
    tokenizer = checkpoint.tokenizer
    chats = [tokenizer.apply_chat_template([{"role": "user", "content": question}]) for question in QUESTIONS]
    prompts = [tokenizer.encode(text, add_special_tokens=False) for text in chats + TEXTS]
    assert len(prompts) >= 20

    decoding = PagedDecoding(
        Decoder(checkpoint.config, weights, choose_kernels(torch.device("cpu"), torch.float32)), num_blocks=200
    )
    sequences = [PagedSequence(list(prompt)) for prompt in prompts]
    for _ in range(NUM_NEW):
        outputs = decoding.step([(s, len(s.token_ids) - s.num_computed) for s in sequences])
        for sequence, output in zip(sequences, outputs, strict=True):
            sequence.token_ids.append(int(output[-1].argmax()))

    theirs = in_transformers(checkpoint.config, weights)
    for prompt, sequence in zip(prompts, sequences, strict=True):
        with torch.inference_mode():
            best = theirs(torch.tensor([sequence.token_ids[:-1]])).logits[0].argmax(-1)
        assert best[len(prompt) - 1 :].tolist() == sequence.token_ids[len(prompt) :], tokenizer.decode(prompt)
