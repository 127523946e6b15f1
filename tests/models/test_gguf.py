import struct
from collections.abc import Sequence
from pathlib import Path

import pytest

from model_files import write_tiny_gguf
from triode.errors import CorruptModel, UnsupportedModel
from triode.models.gguf import GGUFFile

U32, STRING, ARRAY = 4, 8, 9


def text(value: str | bytes) -> bytes:
    raw = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(raw)) + raw


def header(
    *entries: bytes,
    tensors: Sequence[bytes] = (),
    version: int = 3,
    num_entries: int | None = None,
    num_tensors: int | None = None,
) -> bytes:
    counts = (
        len(tensors) if num_tensors is None else num_tensors,
        len(entries) if num_entries is None else num_entries,
    )
    return b"GGUF" + struct.pack("<IQQ", version, *counts) + b"".join(entries) + b"".join(tensors)


def number(key: str | bytes, value: int) -> bytes:
    return text(key) + struct.pack("<II", U32, value)


def tensor(name: str, shape: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def read(tmp_path: Path, content: bytes) -> GGUFFile:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    return GGUFFile(path)


def padded(content: bytes, num_bytes: int) -> bytes:
    return content.ljust(-(-len(content) // 32) * 32, b"\0") + bytes(num_bytes)


def test_values_of_every_type_are_read(tmp_path: Path) -> None:
    values = [
        (0, "B", 200), (1, "b", -3), (2, "H", 65535), (3, "h", -300), (4, "I", 2**32 - 1), (5, "i", -(2**31)),
        (6, "f", 0.5), (7, "?", True), (10, "Q", 2**64 - 1), (11, "q", -(2**63)), (12, "d", 0.1),
    ]  # fmt: skip
    entries = [text(f"k{kind}") + struct.pack(f"<I{code}", kind, value) for kind, code, value in values]
    entries.append(text("s") + struct.pack("<I", STRING) + text("日本"))
    entries.append(text("n") + struct.pack("<IIQ3i", ARRAY, 5, 3, -1, 0, 1))
    entries.append(text("t") + struct.pack("<IIQ", ARRAY, STRING, 2) + text("a") + text(""))
    file = read(tmp_path, header(*entries))
    assert file.metadata == {f"k{kind}": value for kind, _, value in values} | {
        "s": "日本",
        "n": [-1, 0, 1],
        "t": ["a", ""],
    }


def test_tensors_are_found_behind_the_padding(tmp_path: Path) -> None:
    content = header(tensors=[tensor("a", (4, 2), offset=0), tensor("b", (32,), kind=8, offset=32)])
    file = read(tmp_path, padded(content, 32) + bytes(range(34)))
    assert (file.tensors["a"].shape, file.tensors["a"].num_bytes) == ((2, 4), 32)
    assert file.tensors["b"].quantization == "Q8_0"
    assert file.rows(file.tensors["b"], 0, 1).tobytes() == bytes(range(34))


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_every_shorter_file_is_refused(tmp_path: Path, architecture: str) -> None:
    content = write_tiny_gguf(tmp_path / "whole.gguf", architecture).read_bytes()
    for size in [*range(200), *range(200, len(content), 997)]:
        with pytest.raises(CorruptModel):
            read(tmp_path, content[:size])


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CorruptModel, match=r"model\.gguf is empty"):
        read(tmp_path, b"")


HUGE = 2**62


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (b"PK\3\4" + bytes(100), CorruptModel, "is not a GGUF file: it does not begin with GGUF"),
        (header(version=1), UnsupportedModel, "has GGUF version 1; supported are 2 and 3"),
        (header(version=3 << 24), UnsupportedModel, "is a big-endian GGUF file"),
        (header(num_entries=HUGE), CorruptModel, "truncated: its header goes on past the end of the file at 24 bytes"),
        (header(num_tensors=HUGE), CorruptModel, "truncated"),
        (header(struct.pack("<Q", HUGE) + b"key"), CorruptModel, "truncated"),
        (header(text("k") + struct.pack("<IIQ", ARRAY, 10, HUGE)), CorruptModel, "truncated"),
        (header(text("k") + struct.pack("<IIQ", ARRAY, STRING, HUGE)), CorruptModel, "truncated"),
        (header(text("k") + struct.pack("<IIQQ", ARRAY, STRING, 1, HUGE)), CorruptModel, "truncated"),
        (header(text("k") + struct.pack("<IIQ", ARRAY, ARRAY, 1)), CorruptModel, "an array of unknown type 9"),
        (header(text("k") + struct.pack("<I", 77)), CorruptModel, "a value of unknown type 77"),
        (header(number("k", 1), number("k", 1)), CorruptModel, "metadata key 'k' occurs twice"),
        (header(number(b"\xff", 1)), CorruptModel, "a string that is not UTF-8"),
        (
            header(text("k") + struct.pack("<IIQ", ARRAY, STRING, 1) + text(b"\xff")),
            CorruptModel,
            "string 0 of an array is not UTF-8",
        ),
        (header(number("general.alignment", 24)), CorruptModel, "general.alignment must be a power of two, got 24"),
        (header(tensors=[tensor("a", (4,))]), CorruptModel, "truncated: tensor a ends at byte 80 of 57"),
        (header(tensors=[tensor("a", (4,), offset=HUGE)]), CorruptModel, "truncated: tensor a ends"),
        (header(tensors=[tensor("a", (HUGE, HUGE))]), CorruptModel, "truncated: tensor a ends"),
        (header(tensors=[tensor("a", (4, 0))]), CorruptModel, r"tensor a is empty: its shape is \[0, 4\]"),
        (header(tensors=[tensor("a", (1,) * 9)]), CorruptModel, "tensor a has 9 dimensions"),
        (
            header(tensors=[tensor("a", (4,), kind=999)]),
            UnsupportedModel,
            "tensor a has the unknown quantisation type 999",
        ),
        (header(tensors=[tensor("a", (33, 2), kind=8)]), CorruptModel, "rows of 33 elements, which Q8_0 cannot hold"),
    ],
)
def test_a_corrupt_header_is_refused(tmp_path: Path, content: bytes, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        read(tmp_path, content)


def test_a_tensor_that_occurs_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CorruptModel, match="tensor a occurs twice"):
        read(tmp_path, padded(header(tensors=[tensor("a", (4,)), tensor("a", (4,))]), 16))
