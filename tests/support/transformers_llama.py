"""transformers' own Llama around the tensors that Triode has loaded: the oracle of real models."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from triode.models.config import ModelConfig
from triode.models.weights import DecoderWeights


def in_transformers(config: ModelConfig, weights: DecoderWeights, attention: str = "eager") -> LlamaForCausalLM:
    """A model that shares the weights' memory. `attention` is transformers' name of an implementation."""
    settings = LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        rms_norm_eps=config.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope.theta},
        max_position_embeddings=config.max_context_tokens,
        tie_word_embeddings=config.tie_word_embeddings,
        attn_implementation=attention,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(settings)
    model.load_state_dict(_state(config, weights), assign=True)
    # Computed and not loaded, so the one made above is as empty as all else was.
    model.model.rotary_emb = type(model.model.rotary_emb)(settings)
    return model.eval()


def _state(config: ModelConfig, weights: DecoderWeights) -> dict[str, torch.Tensor]:
    state = {
        "model.embed_tokens.weight": weights.embed_VD,
        "model.norm.weight": weights.final_norm_D,
        "lm_head.weight": weights.head_VD,
    }
    for index, layer in enumerate(weights.layers):
        q_ED, k_ED, v_ED = layer.qkv_ED.split((config.q_size, config.kv_size, config.kv_size))
        gate_FD, up_FD = layer.gate_up_FD.chunk(2)
        parts = {
            "input_layernorm": layer.input_norm_D,
            "self_attn.q_proj": q_ED,
            "self_attn.k_proj": k_ED,
            "self_attn.v_proj": v_ED,
            "self_attn.o_proj": layer.o_DE,
            "post_attention_layernorm": layer.post_norm_D,
            "mlp.gate_proj": gate_FD,
            "mlp.up_proj": up_FD,
            "mlp.down_proj": layer.down_DF,
        }
        state |= {f"model.layers.{index}.{name}.weight": tensor for name, tensor in parts.items()}
    return state
