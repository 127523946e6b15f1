"""Which matrix gets which format, and what is refused."""

import pytest

from triode.kernels.native.formats import CHANNEL8, GROUP4, GROUP8, PLAIN, Packing
from triode.models.config import ModelOptions
from triode.models.quantization import NOT_QUANTIZED, matrix_names, plan_weights


def test_without_a_choice_every_matrix_stays_as_it_is() -> None:
    assert NOT_QUANTIZED.is_plain
    assert {NOT_QUANTIZED.packing(name) for name in matrix_names(2)} == {Packing(PLAIN)}


def test_a_format_has_its_own_group_unless_one_is_chosen() -> None:
    assert plan_weights("a16w8").packing("head") == Packing(CHANNEL8)
    assert plan_weights("a16w8", 128).packing("head") == Packing(GROUP8, 128)
    assert plan_weights("a8w8").packing("head") == Packing(GROUP8, 64, byte_inputs=True)
    assert plan_weights("a8w8", 0).packing("head") == Packing(GROUP8, 0, byte_inputs=True)
    assert plan_weights("a16w8", 0).packing("head") == Packing(CHANNEL8)
    assert plan_weights("a16w4").packing("layers.0.o") == Packing(GROUP4, 32)
    assert plan_weights("a8w4", 64).packing("layers.0.o") == Packing(GROUP4, 64, byte_inputs=True)


def test_the_first_pattern_that_matches_a_whole_name_counts() -> None:
    plan = plan_weights("a8w4", overrides={r"layers\.0\..*": "none", r"layers\.\d+\.down": "a8w8", "head": "a16w8"})
    assert plan.packing("layers.0.down") == Packing(PLAIN)
    assert plan.packing("layers.1.down") == Packing(GROUP8, 64, byte_inputs=True)
    assert plan.packing("layers.10.qkv") == Packing(GROUP4, 32, byte_inputs=True)
    assert plan.packing("head") == Packing(CHANNEL8)
    assert not plan.is_plain


def test_the_head_has_8_bits_where_the_layers_have_4_unless_it_is_overridden() -> None:
    assert plan_weights("a16w4").packing("head") == Packing(CHANNEL8)
    assert plan_weights("a8w4", 32).packing("head") == Packing(GROUP8, 32, byte_inputs=True)
    assert plan_weights("a8w4", None, {"head": "a8w4"}).packing("head") == Packing(GROUP4, 32, byte_inputs=True)


def test_the_embedding_stays_as_it_is_unless_it_is_overridden() -> None:
    assert plan_weights("a8w8").packing("embedding") == Packing(PLAIN)
    assert plan_weights("a8w8", None, {"embedding": "a16w4"}).packing("embedding") == Packing(GROUP4, 32)
    plan_weights("none", overrides={"embedding": "a8w8"}).check(1)


def test_a_pattern_must_match_some_matrix_of_the_model() -> None:
    plan_weights("none", overrides={r"layers\.3\.qkv": "a8w8"}).check(4)
    with pytest.raises(ValueError, match=r"layers\.0\.qkv to layers\.2\.down .* got 'layers\\\\\.3\\\\\.qkv'"):
        plan_weights("none", overrides={r"layers\.3\.qkv": "a8w8"}).check(3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantization": "a4w4"}, "quantization must be one of none, a16w8, .*, got 'a4w4'"),
        (
            {"quantization": "a8w8", "quantization_group": 16},
            "quantization_group must be one of 32, 64, 128, or 0 for whole rows, got 16",
        ),
        ({"quantization": "a8w4", "quantization_group": 0}, "quantization_group must be one of .* for 4 bits, got 0"),
        ({"quantization_group": 64}, "quantization_group must be None with quantization='none', got 64"),
        (
            {"quantization_overrides": {"head": "int8"}},
            r"quantization_overrides\['head'\] must be one of .* got 'int8'",
        ),
        ({"quantization_overrides": {"(": "a8w8"}}, r"must hold regular expressions, got '\('"),
    ],
)
def test_a_wrong_choice_is_refused_by_name(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelOptions(model="smollm2-135m", **options)  # type: ignore[arg-type]
