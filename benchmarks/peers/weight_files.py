"""The weights of a comparison, in the files that each engine reads: GGUF in any format, or a folder of safetensors.

SmolLM2 is a GGUF file of 4 bits. A random model is written as one of bfloat16 first. llama.cpp's own quantiser converts.
What is written stays in $XDG_CACHE_HOME/triode/benchmarks.
"""

import json
import os
import subprocess
from pathlib import Path

import gguf
import numpy as np
import torch
from environments import python_of
from safetensors.torch import save_file

from triode.models.config import ModelConfig, ModelOptions
from triode.models.gguf import GGUFFile, Scalar
from triode.models.loader import open_checkpoint
from triode.models.progress import NullProgress
from triode.models.source import ALIASES, RANDOM_PREFIX, locate
from triode.models.weights import places

CONVERTER = Path(__file__).with_name("convert_gguf.py")
_ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}
_UNUSED = 5
"""The type of a token that no text has."""


def gguf_of(model: str, form: str) -> Path:
    """The model's weights in a format of GGUF."""
    source = _random_gguf(model) if model.startswith(RANDOM_PREFIX) else locate(model, NullProgress())
    if source.name.endswith(f".{form}.gguf"):
        return source
    target = _folder() / f"{source.stem.rpartition('.')[0]}.{form}.gguf"
    if not target.exists():
        unfinished = target.with_suffix(".tmp")
        subprocess.run([python_of("llama-cpp"), CONVERTER, source, form, unfinished], check=True)
        unfinished.rename(target)
    return target


def folder_of(model: str) -> Path:
    """The model's weights in bfloat16, with a config for transformers and what follows it."""
    target = _folder() / model.replace(":", "-")
    weights = target / "model.safetensors"
    if weights.exists():
        return target
    target.mkdir(exist_ok=True)
    checkpoint = open_checkpoint(ModelOptions(model=model))
    loaded = checkpoint.load_weights(torch.bfloat16, torch.device("cpu"))
    (target / "config.json").write_text(json.dumps(_config_json(checkpoint.config)))
    unfinished = weights.with_suffix(".tmp")
    # Views of larger tensors cannot be saved.
    save_file({name: tensor.clone() for name, tensor in places(checkpoint.config, loaded)}, unfinished)
    unfinished.rename(weights)
    return target


def _folder() -> Path:
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "triode" / "benchmarks"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _config_json(config: ModelConfig) -> dict[str, object]:
    return {
        "architectures": [_ARCHITECTURES[config.architecture]],
        "model_type": config.architecture,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_context_tokens,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope.theta,
        "tie_word_embeddings": config.tie_word_embeddings,
        "hidden_act": "silu",
        "dtype": "bfloat16",
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_ids[0],
    }


def _random_gguf(model: str) -> Path:
    """A random model as a GGUF file of bfloat16, with SmolLM2's tokenizer; tokens beyond its own are never text."""
    target = _folder() / f"{model.replace(':', '-')}.BF16.gguf"
    if target.exists():
        return target
    checkpoint = open_checkpoint(ModelOptions(model=model))
    config = checkpoint.config
    if config.architecture != "qwen2":
        raise ValueError(f"model must be a random qwen2, whose rows GGUF does not reorder, got {model!r}")
    unfinished = target.with_suffix(".tmp")
    writer = gguf.GGUFWriter(unfinished, config.architecture)
    _add_sizes(writer, config)
    _add_tokenizer(writer, config)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, config.num_layers)
    loaded = checkpoint.load_weights(torch.bfloat16, torch.device("cpu"))
    for name, tensor in places(config, loaded):
        gguf_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        numbers = tensor.float().numpy()
        if numbers.ndim == 1:
            writer.add_tensor(gguf_name, numbers)
            continue
        # The bits of bfloat16 are the upper half of a float's.
        halves = (np.ascontiguousarray(numbers).view(np.uint32) >> 16).astype(np.uint16)
        writer.add_tensor(gguf_name, halves.view(np.uint8), raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    unfinished.rename(target)
    return target


def _add_sizes(writer: gguf.GGUFWriter, config: ModelConfig) -> None:
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_context_tokens)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_rope_freq_base(config.rope.theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)


def _add_tokenizer(writer: gguf.GGUFWriter, config: ModelConfig) -> None:
    metadata = GGUFFile(locate(ALIASES[0], NullProgress())).metadata

    def array(key: str) -> list[Scalar]:
        values = metadata[f"tokenizer.ggml.{key}"]
        assert isinstance(values, list), "it has many"
        return values

    tokens, types = array("tokens"), array("token_type")
    unused = range(len(tokens), config.vocab_size)
    writer.add_tokenizer_model(metadata["tokenizer.ggml.model"])
    writer.add_tokenizer_pre(metadata["tokenizer.ggml.pre"])
    writer.add_token_list([*tokens, *(f"[unused{index}]" for index in unused)])
    writer.add_token_types([*types, *(_UNUSED for _ in unused)])
    writer.add_token_merges(array("merges"))
    writer.add_bos_token_id(config.bos_token_id)
    writer.add_eos_token_id(config.eos_token_ids[0])
    writer.add_add_bos_token(False)
    writer.add_chat_template(metadata["tokenizer.chat_template"])
