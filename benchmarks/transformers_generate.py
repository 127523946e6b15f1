"""transformers' side of `against_transformers.py`: Triode's tensors in transformers' own Llama, and its `generate`."""

from collections.abc import Sequence
from functools import cache
from time import perf_counter

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from triode.models.config import ModelConfig, ModelOptions
from triode.models.loader import open_checkpoint
from triode.models.weights import DecoderWeights


def generate(
    model: str, dtype: str, prompts: Sequence[Sequence[int]], new_tokens: int
) -> tuple[float, list[tuple[int, ...]]]:
    """As many new tokens of prompts of one length, greedy: the seconds, and the tokens of each."""
    llama, prompt_BT = _model(model, dtype), torch.tensor(prompts)
    started_at_s = perf_counter()
    with torch.inference_mode():
        output_BT = llama.generate(
            prompt_BT,
            attention_mask=torch.ones_like(prompt_BT),
            max_new_tokens=new_tokens,
            do_sample=False,
        )
    tokens = [tuple(row[prompt_BT.shape[1] :]) for row in output_BT.tolist()]
    return perf_counter() - started_at_s, tokens


@cache
def _model(model: str, dtype: str) -> LlamaForCausalLM:
    """transformers' own Llama around the tensors that Triode loads."""
    checkpoint = open_checkpoint(ModelOptions(model=model))
    config, weights = checkpoint.config, checkpoint.load_weights(getattr(torch, dtype), torch.device("cpu"))
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            rms_norm_eps=config.rms_norm_eps,
            max_position_embeddings=config.max_context_tokens,
            tie_word_embeddings=config.tie_word_embeddings,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope.theta},
        )
    )
    llama = llama.to(getattr(torch, dtype)).eval()
    llama.load_state_dict(_hf_tensors(config, weights))
    # No token ends a reply: both sides make exactly as many as they are asked for.
    llama.generation_config.eos_token_id = None
    llama.generation_config.pad_token_id = 0
    return llama


def _hf_tensors(config: ModelConfig, weights: DecoderWeights) -> dict[str, torch.Tensor]:
    tensors = {
        "model.embed_tokens.weight": weights.embed_VD,
        "model.norm.weight": weights.final_norm_D,
        "lm_head.weight": weights.head_VD,
    }
    q_rows, kv_rows = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    for index, layer in enumerate(weights.layers):
        q, k, v = layer.qkv_ED.split((q_rows, kv_rows, kv_rows))
        gate, up = layer.gate_up_FD.chunk(2)
        own = {
            "self_attn.q_proj": q,
            "self_attn.k_proj": k,
            "self_attn.v_proj": v,
            "self_attn.o_proj": layer.o_DE,
            "mlp.gate_proj": gate,
            "mlp.up_proj": up,
            "mlp.down_proj": layer.down_DF,
            "input_layernorm": layer.input_norm_D,
            "post_attention_layernorm": layer.post_norm_D,
        }
        tensors |= {f"model.layers.{index}.{name}.weight": tensor for name, tensor in own.items()}
    return tensors
