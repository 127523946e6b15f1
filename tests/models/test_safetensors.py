import json
import re
import shutil
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from model_files import write_safetensors
from trained_tokenizers import byte_level_bpe
from triode.errors import CorruptModel, InsufficientMemory, ModelNotFound, UnsupportedModel
from triode.models import room
from triode.models.config import ModelOptions
from triode.models.loader import Checkpoint, open_checkpoint
from triode.models.parallel import RankOrder
from triode.models.progress import Progress
from triode.models.weights import DecoderWeights, allocate, places

CPU = torch.device("cpu")
FAMILIES = ["llama", "mistral", "qwen2", "qwen3"]
SIZES = {
    "vocab_size": 600,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}


def write_model(
    folder: Path, family: str, *, dtype: torch.dtype = torch.float32, shard_size: str = "1GB", **changes: object
) -> dict[str, torch.Tensor]:
    """A checkpoint as transformers writes it; the reference to what must be read."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what transformers warns of is not under test
        from transformers import AutoConfig, AutoModelForCausalLM

        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**SIZES, **changes}), dtype=dtype)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter)
        model.save_pretrained(folder, max_shard_size=shard_size)
    byte_level_bpe().save(str(folder / "tokenizer.json"))
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def open_folder(folder: Path) -> Checkpoint:
    return open_checkpoint(ModelOptions(model=str(folder)))


def load(folder: Path, dtype: torch.dtype = torch.float32, progress: Progress | None = None) -> DecoderWeights:
    return open_folder(folder).load_weights(dtype, CPU, progress)


def assert_equal_to(
    folder: Path, weights: DecoderWeights, state: dict[str, torch.Tensor], dtype: torch.dtype = torch.float32
) -> None:
    loaded = dict(places(open_folder(folder).config, weights))
    if weights.head_VD is weights.embed_VD:
        state = {name: tensor for name, tensor in state.items() if name != "lm_head.weight"}
    assert loaded.keys() == state.keys()
    for name, tensor in state.items():
        assert loaded[name].dtype == dtype
        assert torch.equal(loaded[name], tensor.to(dtype)), name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shard_size", ["1GB", "20KB"])
@pytest.mark.parametrize("tied", [True, False])
def test_every_tensor_that_transformers_writes_arrives_in_its_place(
    tmp_path: Path, family: str, shard_size: str, tied: bool
) -> None:
    state = write_model(tmp_path, family, shard_size=shard_size, tie_word_embeddings=tied)
    weights = load(tmp_path)
    assert (weights.head_VD is weights.embed_VD) == tied
    assert_equal_to(tmp_path, weights, state)


def test_biases_arrive_where_the_config_switches_them_on(tmp_path: Path) -> None:
    state = write_model(tmp_path, "llama", attention_bias=True, mlp_bias=True)
    assert_equal_to(tmp_path, load(tmp_path), state)


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_are_converted_on_the_way(tmp_path: Path, stored: torch.dtype, dtype: torch.dtype) -> None:
    state = write_model(tmp_path, "qwen2", dtype=stored)
    assert_equal_to(tmp_path, load(tmp_path, dtype), state, dtype)


def test_q_k_and_v_are_rows_of_one_tensor(tmp_path: Path) -> None:
    state = write_model(tmp_path, "llama")
    layer = load(tmp_path).layers[1]
    fused = [state[f"model.layers.1.self_attn.{kind}_proj.weight"] for kind in "qkv"]
    assert torch.equal(layer.qkv_ED, torch.cat(fused))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    write_model(tmp_path, "llama", tie_word_embeddings=True)
    return tmp_path


def rewrite(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "model.safetensors"
    state = load_file(path)
    change(state)
    save_file(state, folder / "changed.safetensors")
    shutil.move(folder / "changed.safetensors", path)


def test_a_missing_tensor_is_refused_by_file_and_name(model: Path) -> None:
    rewrite(model, lambda state: state.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(CorruptModel, match=r"tensor model\.layers\.1\.mlp\.up_proj\.weight is missing"):
        load(model)


def test_a_tensor_of_another_shape_is_refused_by_file_and_name(model: Path) -> None:
    rewrite(model, lambda state: state.update({"model.norm.weight": torch.ones(7)}))
    message = r"model\.safetensors: tensor model\.norm\.weight must have the shape \[32\], got \[7\]"
    with pytest.raises(CorruptModel, match=message):
        load(model)


def test_a_tensor_too_many_is_refused_by_file_and_name(model: Path) -> None:
    rewrite(model, lambda state: state.update({"model.layers.0.self_attn.q_proj.lora_A": torch.ones(2, 2)}))
    with pytest.raises(UnsupportedModel, match=r"q_proj\.lora_A is unexpected: this llama model has no such tensor"):
        load(model)


def test_stored_rotary_tables_are_ignored(model: Path) -> None:
    rewrite(model, lambda state: state.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    assert load(model).layers


def test_a_tied_head_may_be_stored_again_if_it_is_the_same(model: Path) -> None:
    rewrite(model, lambda state: state.update({"lm_head.weight": state["model.embed_tokens.weight"].clone()}))
    weights = load(model)
    assert weights.head_VD is weights.embed_VD
    rewrite(model, lambda state: state["lm_head.weight"].add_(1))
    with pytest.raises(
        UnsupportedModel, match=r"lm_head\.weight differs from the embeddings, to which the config ties"
    ):
        load(model)


def test_an_integer_tensor_is_refused_by_name(model: Path) -> None:
    rewrite(model, lambda state: state.update({"model.norm.weight": torch.ones(32, dtype=torch.int8)}))
    with pytest.raises(UnsupportedModel, match=r"tensor model\.norm\.weight has the unsupported dtype I8"):
        load(model)


@pytest.mark.parametrize("size", [0, 5, 1000, 40_000])
def test_a_truncated_file_is_refused_by_name(model: Path, size: int) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(CorruptModel, match=r"model\.safetensors is truncated or not a safetensors file"):
        load(model)


@pytest.mark.parametrize(
    "header",
    [
        {"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}},
        {"a": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 16]}},
        {"a": {"dtype": "F32", "shape": [8], "data_offsets": [0, 16]}},
        {"a": "tensor"},
    ],
)
def test_a_header_that_promises_what_is_not_there_is_refused(model: Path, header: dict[str, object]) -> None:
    write_safetensors(model / "model.safetensors", header, bytes(16))
    with pytest.raises(CorruptModel, match="is truncated or not a safetensors file"):
        load(model)


def test_a_folder_without_weights_is_refused(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    with pytest.raises(ModelNotFound, match="only safetensors are loaded"):
        load(model)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    write_model(tmp_path, "llama", shard_size="20KB")
    return tmp_path


def change_index(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))


def test_a_missing_shard_is_refused_by_name(sharded: Path) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(CorruptModel, match=re.escape(f"{shard} is missing, which model.safetensors.index.json names")):
        load(sharded)


def test_a_truncated_shard_is_refused_by_name(sharded: Path) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(CorruptModel, match=re.escape(f"{shard} is truncated")):
        load(sharded)


def test_an_index_that_names_a_tensor_no_shard_has_is_refused(sharded: Path) -> None:
    change_index(sharded, lambda index: index["weight_map"].update({"extra": next(iter(index["weight_map"].values()))}))
    with pytest.raises(CorruptModel, match="tensor extra is missing, which"):
        load(sharded)


@pytest.mark.parametrize("name", ["../model.safetensors", "", 7])
def test_an_index_cannot_reach_outside_its_folder(sharded: Path, name: object) -> None:
    change_index(sharded, lambda index: index["weight_map"].update({"model.norm.weight": name}))
    with pytest.raises(CorruptModel, match="weight_map must hold file names, got"):
        load(sharded)


def test_a_tensor_in_two_shards_is_refused(sharded: Path) -> None:
    first, second = sorted(sharded.glob("*.safetensors"))[:2]
    save_file({**load_file(second), **load_file(first)}, second)
    with pytest.raises(CorruptModel, match=r"tensor .* is in .* too"):
        load(sharded)


class Watcher:
    def __init__(self, stop_after: int | None = None) -> None:
        self.stages: list[object] = []
        self.amounts: list[int] = []
        self.stop_after = stop_after

    def stage(self, name: str, total: int | None, unit: str) -> None:
        self.stages.append((name, total, unit))

    def advance(self, amount: int) -> None:
        self.amounts.append(amount)
        if len(self.amounts) == self.stop_after:
            raise InterruptedError

    def done(self) -> None:
        self.stages.append("done")


def test_progress_counts_every_byte_once(model: Path) -> None:
    watcher = Watcher()
    weights = load(model, torch.bfloat16, watcher)
    num_bytes = sum(view.nbytes for _, view in places(open_folder(model).config, weights))
    assert watcher.stages == [("Loading weights", num_bytes, "B"), "done"]
    assert sum(watcher.amounts) == num_bytes


def test_loading_stops_at_the_next_tensor_when_progress_raises(model: Path) -> None:
    watcher = Watcher(stop_after=3)
    with pytest.raises(InterruptedError):
        load(model, progress=watcher)
    assert len(watcher.amounts) == 3


def test_weights_that_do_not_fit_are_refused_before_anything_is_read(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "free_memory_bytes", lambda device: 1000)
    watcher = Watcher()
    with pytest.raises(InsufficientMemory, match="choose a smaller model or dtype"):
        load(model, progress=watcher)
    assert watcher.stages == []


def test_shares_that_fit_alone_and_not_together_are_refused(model: Path) -> None:
    checkpoint = open_folder(model)
    meta = allocate(checkpoint.config, torch.float32, "meta")
    num_bytes = sum(view.nbytes for _, view in places(checkpoint.config, meta))
    for free_bytes in (2 * num_bytes, 2 * num_bytes - 1):
        ranks = RankOrder(rank=0, num_ranks=2, memory_fd=-1, links=(), free_bytes=free_bytes)
        fits = free_bytes == 2 * num_bytes
        with (
            nullcontext() if fits else pytest.raises(InsufficientMemory, match="in each of 2 processes, and there were")
        ):
            checkpoint.load_weights(torch.float32, CPU, ranks=ranks)


def anonymous_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


class PeakWatcher(Watcher):
    def advance(self, amount: int) -> None:
        super().advance(anonymous_bytes())


@pytest.mark.parametrize("scale", [1, pytest.param(10, marks=pytest.mark.slow)])
def test_loading_holds_no_second_copy(tmp_path: Path, scale: int) -> None:
    write_model(
        tmp_path, "llama", dtype=torch.bfloat16, hidden_size=256, intermediate_size=2048, vocab_size=4096 * scale,
        num_hidden_layers=4 * scale, tie_word_embeddings=True,
    )  # fmt: skip
    checkpoint, watcher = open_folder(tmp_path), PeakWatcher()
    before = anonymous_bytes()
    weights = checkpoint.load_weights(torch.float32, CPU, watcher)
    weights_bytes = sum(view.nbytes for _, view in places(checkpoint.config, weights))
    assert weights_bytes > 20e6 * scale
    assert max(watcher.amounts) - before < 1.1 * weights_bytes
