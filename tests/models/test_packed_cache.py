"""A file of packed weights: the same bits as without it, and never the wrong one."""

import resource
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from model_files import write_tiny_gguf
from native_steps import native_library
from paged_decoding import PagedDecoding, PagedSequence
from triode.errors import InsufficientMemory
from triode.models import packed_file, room
from triode.models.config import ModelOptions
from triode.models.loader import open_checkpoint
from triode.models.native import NativeDecoder
from triode.models.packed_file import PackedFile
from triode.models.packed_load import load_packed
from triode.models.parallel import RankOrder
from triode.models.progress import NullProgress
from triode.models.quantization import plan_weights

TOKENS = [(7 * i) % 200 for i in range(40)]


class Watcher(NullProgress):
    """Remembers what was announced."""

    def __init__(self) -> None:
        self.stages: list[str] = []

    def stage(self, title: str, total: float | None, unit: str) -> None:
        self.stages.append(title)


def logits(options: ModelOptions, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, list[str]]:
    """Of one start, and the stages that it announced."""
    library = native_library()
    checkpoint, watcher = open_checkpoint(options), Watcher()
    plan = plan_weights(options.quantization, options.quantization_group, options.quantization_overrides)
    with torch.inference_mode():
        if options.packed_cache is None:
            weights = checkpoint.load_weights(dtype, torch.device("cpu"), plan=plan)
        else:
            weights = load_packed(checkpoint, options, dtype, plan, watcher)
        decoder = NativeDecoder(checkpoint.config, weights, library, plan=plan)
    (found,) = PagedDecoding(decoder, num_blocks=20).step([(PagedSequence(TOKENS), len(TOKENS))])
    return found, watcher.stages


@pytest.mark.parametrize("quantization", ["none", "a16w8", "a8w8", "a16w4", "a8gguf"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_a_second_start_reads_the_same_bits_and_no_checkpoint(
    tmp_path: Path, architecture: str, quantization: str
) -> None:
    model = str(write_tiny_gguf(tmp_path / "m.gguf", architecture, "Q4_1"))
    plain = ModelOptions(model=model, quantization=quantization)  # type: ignore[arg-type]
    expected, _ = logits(plain)
    cached = ModelOptions(model=model, quantization=quantization, packed_cache=str(tmp_path / "packed"))  # type: ignore[arg-type]
    first, stages = logits(cached)
    assert any("there is no" in stage for stage in stages)
    second, stages = logits(cached)
    assert stages == []
    assert torch.equal(first, expected)
    assert torch.equal(second, expected)


@pytest.mark.parametrize(
    "overrides", [{"embedding": "a8w8"}, {"embedding": "a16w8"}, {"head": "a16gguf", "embedding": "a16gguf"}]
)
def test_an_embedding_in_a_format_of_its_own_is_read_again_too(tmp_path: Path, overrides: dict[str, str]) -> None:
    options = ModelOptions(
        model=str(write_tiny_gguf(tmp_path / "m.gguf", "llama", "Q8_0")),
        quantization="a8w8",
        quantization_overrides=overrides,
        packed_cache=str(tmp_path / "packed"),
    )
    first, _ = logits(options)
    second, stages = logits(options)
    assert stages == []
    assert torch.equal(first, second)


def test_another_format_dtype_context_or_file_makes_it_anew(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "m.gguf", "llama", "Q8_0")
    options = ModelOptions(model=str(path), quantization="a8w8", packed_cache=str(tmp_path / "packed"))
    logits(options)

    def is_made_anew(changed: ModelOptions, dtype: torch.dtype = torch.float32) -> bool:
        got, stages = logits(changed, dtype)
        without = ModelOptions(
            model=changed.model,
            quantization=changed.quantization,
            quantization_group=changed.quantization_group,
            quantization_overrides=changed.quantization_overrides,
            max_context_tokens=changed.max_context_tokens,
        )
        assert torch.equal(got, logits(without, dtype)[0])
        return any("was made of another model" in stage for stage in stages)

    cache = str(tmp_path / "packed")
    model = str(path)
    assert not is_made_anew(options)
    assert is_made_anew(ModelOptions(model=model, quantization="a8w8", quantization_group=32, packed_cache=cache))
    assert is_made_anew(ModelOptions(model=model, quantization_overrides={"head": "a8w8"}, packed_cache=cache))
    assert is_made_anew(options)
    assert is_made_anew(options, torch.bfloat16)
    assert is_made_anew(ModelOptions(model=model, quantization="a8w8", max_context_tokens=64, packed_cache=cache))
    write_tiny_gguf(path, "llama", "Q4_0")
    assert is_made_anew(options)
    assert not is_made_anew(options)


@pytest.mark.parametrize("damage", ["cut", "a changed byte", "not such a file", "empty"])
def test_a_damaged_file_is_made_anew_with_a_message(tmp_path: Path, damage: str) -> None:
    packed = tmp_path / "packed"
    options = ModelOptions(
        model=str(write_tiny_gguf(tmp_path / "m.gguf", "llama", "Q8_0")), quantization="a8w8", packed_cache=str(packed)
    )
    expected, _ = logits(options)
    whole = packed.read_bytes()
    changed = bytearray(whole)
    changed[-len(whole) // 3] ^= 4
    packed.write_bytes(
        {"cut": whole[:-100], "a changed byte": bytes(changed), "not such a file": b"x" * 900}.get(damage, b"")
    )
    got, stages = logits(options)
    assert any("is damaged" in stage for stage in stages)
    assert torch.equal(got, expected)
    assert logits(options)[1] == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.gguf", "packed"]


def test_a_file_that_cannot_be_had_is_refused(tmp_path: Path) -> None:
    model = str(write_tiny_gguf(tmp_path / "m.gguf", "llama"))
    with pytest.raises(ValueError, match=r"packed_cache must be in a folder that exists, got '.*nowhere/packed'"):
        logits(ModelOptions(model=model, packed_cache=str(tmp_path / "nowhere" / "packed")))
    with pytest.raises(ValueError, match="packed_cache must be None without native kernels"):
        logits(ModelOptions(model=model, kernels="reference", packed_cache=str(tmp_path / "packed")))


def test_packed_weights_that_do_not_fit_are_refused_before_they_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = tmp_path / "packed"
    options = ModelOptions(
        model=str(write_tiny_gguf(tmp_path / "m.gguf", "llama", "Q8_0")), quantization="a8w8", packed_cache=str(packed)
    )
    logits(options)
    num_bytes = packed.stat().st_size
    monkeypatch.setattr(packed_file, "_sums", lambda *_: pytest.fail("the weights were read"))
    monkeypatch.setattr(room, "free_memory_bytes", lambda device: num_bytes - 1)
    with pytest.raises(
        InsufficientMemory, match=r"the packed weights in .*/packed take .* smaller model or quantization"
    ):
        logits(options)


def test_packed_shares_that_fit_alone_and_not_together_are_refused(tmp_path: Path) -> None:
    file = PackedFile(tmp_path / "packed", "key")
    file.write(torch.zeros(1000, dtype=torch.uint8), [], {})
    num_bytes = file.path.stat().st_size
    for free_bytes in (2 * num_bytes, 2 * num_bytes - 1):
        ranks = RankOrder(rank=0, num_ranks=2, memory_fd=-1, links=(), free_bytes=free_bytes)
        fits = free_bytes == 2 * num_bytes
        with nullcontext() if fits else pytest.raises(InsufficientMemory, match="in each of 2 processes"):
            assert not isinstance(file.read(ranks), str)


def test_a_disk_that_is_full_is_an_error_of_the_system_and_leaves_no_file(tmp_path: Path) -> None:
    arrays = torch.zeros(100_000, dtype=torch.uint8)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Signals and files of the process are as usual otherwise: Python ignores SIGXFSZ.
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        with pytest.raises(OSError, match="packed cannot be written"):
            PackedFile(tmp_path / "packed", "key").write(arrays, [], {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []
