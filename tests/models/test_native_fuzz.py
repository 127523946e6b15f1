"""Whatever tables the compiled step is given, it computes within its memory or refuses: what the sanitizers run."""

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from native_steps import native_decoder
from tiny_decoders import tiny_config, tiny_weights
from triode.cache.pool import elements_per_head
from triode.kernels.native.library import MatrixStruct, ModelStruct
from triode.kernels.paged_attention.rows import AttentionRows
from triode.models.batch import StepBatch
from triode.models.native import NativeDecoder

CONFIG = tiny_config(sliding_window_tokens=20, sliding_layers=(True, False))
NUM_BLOCKS, BLOCK_SIZE, MAX_TOKENS = 9, 16, 40
ANY_INT = st.one_of(st.integers(-3, 200), st.sampled_from([2**31, 2**62, 2**63 - 1, -(2**31), -(2**63)]))
KV_DTYPES = [torch.bfloat16, torch.int8]


@cache
def decoder() -> NativeDecoder:
    return native_decoder(CONFIG, tiny_weights(CONFIG, torch.bfloat16))


@dataclass
class Tables:
    """The arrays of a step."""

    token_ids: np.ndarray
    positions: np.ndarray
    slots: np.ndarray
    query_start: np.ndarray
    start: np.ndarray
    block_table: np.ndarray
    wanted_start: np.ndarray

    def fit(self) -> bool:
        """Whether every index is one that exists, said again in Python's unlimited integers."""
        counts = [b - a for a, b in zip(self.query_start.tolist(), self.query_start.tolist()[1:], strict=False)]
        wanted = self.wanted_start.tolist()
        columns = self.block_table.shape[1]
        return (
            self.query_start[0] == 0
            and self.query_start[-1] == len(self.token_ids)
            and min(counts) >= 1
            and wanted[0] == 0
            and all(0 <= b - a <= count for a, b, count in zip(wanted, wanted[1:], counts, strict=False))
            and all(0 <= token < CONFIG.vocab_size for token in self.token_ids.tolist())
            and all(0 <= position < CONFIG.max_context_tokens for position in self.positions.tolist())
            and all(0 <= slot < NUM_BLOCKS * BLOCK_SIZE for slot in self.slots.tolist())
            and all(
                0 <= start <= columns * BLOCK_SIZE - count
                and all(0 <= block < NUM_BLOCKS for block in blocks[: (start + count - 1) // BLOCK_SIZE + 1])
                for start, count, blocks in zip(self.start.tolist(), counts, self.block_table.tolist(), strict=True)
            )
        )

    def batch(self) -> StepBatch:
        return StepBatch(
            torch.from_numpy(self.token_ids),
            torch.from_numpy(self.positions)[None],
            torch.from_numpy(self.slots),
            AttentionRows(self.query_start, self.start, self.block_table, BLOCK_SIZE),
            self.wanted_start,
        )


@st.composite
def tables(draw: st.DrawFn, field: str) -> Tables:
    """A step that fits, but for up to two numbers of a field, which are anything."""
    columns = draw(st.integers(1, 3))
    counts = draw(st.lists(st.one_of(st.just(1), st.integers(1, 12)), min_size=1, max_size=3))
    total = sum(counts)

    def array(values: st.SearchStrategy[int], *shape: int) -> np.ndarray:
        size = int(np.prod(shape))
        return np.array(draw(st.lists(values, min_size=size, max_size=size)), np.int64).reshape(shape)

    made = Tables(
        token_ids=array(st.integers(0, CONFIG.vocab_size - 1), total),
        positions=array(st.integers(0, CONFIG.max_context_tokens - 1), total),
        slots=array(st.integers(0, NUM_BLOCKS * BLOCK_SIZE - 1), total),
        query_start=np.cumsum([0, *counts]),
        start=np.array([draw(st.integers(0, columns * BLOCK_SIZE - count)) for count in counts]),
        block_table=array(st.integers(0, NUM_BLOCKS - 1), len(counts), columns),
        wanted_start=np.cumsum([0, *(draw(st.integers(0, count)) for count in counts)]),
    )
    for _ in range(draw(st.integers(0, 2))):
        target = getattr(made, field)
        target.flat[draw(st.integers(0, target.size - 1))] = draw(ANY_INT)
    return made


@pytest.mark.parametrize("field", Tables.__dataclass_fields__)
@given(data=st.data(), kv_dtype=st.sampled_from(KV_DTYPES))
def test_any_batch_is_computed_in_full_or_refused(field: str, data: st.DataObject, kv_dtype: torch.dtype) -> None:
    made = data.draw(tables(field))
    shape = (NUM_BLOCKS, BLOCK_SIZE, CONFIG.num_kv_heads, elements_per_head(CONFIG.head_dim, kv_dtype))
    # Whatever a table points to is a number.
    cache = [torch.zeros(shape, dtype=kv_dtype) for _ in range(2 * CONFIG.num_layers)]
    keys, values = cache[: CONFIG.num_layers], cache[CONFIG.num_layers :]
    batch = made.batch()
    if made.fit():
        hidden_WD = decoder().forward(batch, keys, values)
        assert len(hidden_WD) == batch.num_wanted
        assert hidden_WD.isfinite().all()
        return
    with pytest.raises(ValueError, match="batch must hold tokens, positions, slots and blocks that exist"):
        decoder().forward(batch, keys, values)
    assert not any(tensor.any() for tensor in cache)


@pytest.mark.parametrize("field", ["positions", "slots", "query_start", "start", "block_table", "wanted_start"])
def test_arrays_of_different_lengths_are_refused(field: str) -> None:
    ones = np.ones(2, np.int64)
    made = Tables(ones, ones, ones, np.arange(3), ones, ones[:, None], np.arange(3))
    setattr(made, field, getattr(made, field)[:-1])
    cache = [torch.zeros(9, BLOCK_SIZE, CONFIG.num_kv_heads, CONFIG.head_dim) for _ in range(2 * CONFIG.num_layers)]
    pool = [tensor.bfloat16() for tensor in cache]
    with pytest.raises(ValueError, match="two ends and a block table for each row"):
        decoder().forward(made.batch(), pool[:2], pool[2:])


def numbers(struct: ctypes.Structure) -> Iterator[tuple[ctypes.Structure, str]]:
    """Every field of a table of layers whose meaning the step can check, with the struct that holds it."""
    unchecked = {
        "is_bf16",
        "num_layers",
        "num_positions",
        "norm_eps",
        "bias",
        "scales",
        "group",
        "byte_inputs",
        "q_norm",
        "k_norm",
        "ranks",
    }
    for name, kind, *_ in struct._fields_:
        if name == "layers":
            assert isinstance(struct, ModelStruct)
            for index in range(CONFIG.num_layers):
                yield from numbers(struct.layers[index])
        elif kind is MatrixStruct:
            yield from numbers(getattr(struct, name))
        elif name not in unchecked:
            yield struct, name


@given(st.data())
def test_a_table_of_layers_that_contradicts_itself_is_refused(data: st.DataObject) -> None:
    whole = decoder()
    library, model = whole._library, whole._model
    library.check(model)
    struct, name = data.draw(st.sampled_from(list(numbers(model))))
    before = getattr(struct, name)
    is_address = name in ("panels", "final_norm", "cos", "sin", "input_norm", "post_norm")
    changed = 0 if is_address else data.draw(ANY_INT.filter(lambda value: value != before))
    is_harmless = (name == "window_tokens" and changed >= 0) or (name == "format" and changed == 0)
    setattr(struct, name, changed)
    try:
        if is_harmless or (name == "format" and changed in range(7)):
            return
        with pytest.raises(ValueError, match="the table of layers must fit the model's sizes, but "):
            library.check(model)
    finally:
        setattr(struct, name, before)


@pytest.mark.parametrize(
    ("field", "value", "complaint"),
    [
        ("head_dim", 15, "an odd head size"),
        ("num_kv_heads", 4, "not a multiple of KV heads"),
        ("num_layers", 0, "a size is not between 1 and"),
        ("num_positions", 0, "there are no positions"),
        ("norm_eps", float("nan"), "epsilon"),
        ("final_norm", None, "a tensor is missing"),
        ("vocab_size", 500, "other sizes than its model"),
    ],
)
def test_what_is_wrong_with_a_table_of_layers_is_said(field: str, value: float | None, complaint: str) -> None:
    whole = decoder()
    model = ModelStruct.from_buffer_copy(whole._model)
    setattr(model, field, value)
    with pytest.raises(ValueError, match=complaint):
        whole._library.check(model)


def test_a_matrix_in_an_unknown_format_is_refused() -> None:
    whole = decoder()
    head = MatrixStruct.from_buffer_copy(whole._model.head)
    for changes in ({"format": 7}, {"format": 1, "scales": None}, {"format": 2, "group": 48}, {"panels": None}):
        for name, value in changes.items():
            setattr(whole._model.head, name, value)
        with pytest.raises(ValueError, match="a matrix "):
            whole._library.check(whole._model)
        whole._model.head = head
    whole._library.check(whole._model)
