import pytest

pytest.importorskip("triton")

from cross_compile import HOPPER
from triode.kernels.paged_attention.tiles import splits_of_long_rows

MAX_SEGMENTS = 16


def splits(num_programs: int, num_segments: int) -> int:
    return splits_of_long_rows(num_programs, num_segments, MAX_SEGMENTS, HOPPER)


def test_programs_that_share_a_row_all_run_at_once() -> None:
    for num_programs in range(1, 300):
        for num_segments in range(1, MAX_SEGMENTS + 1):
            num_splits = splits(num_programs, num_segments)
            assert num_splits == 1 or num_programs * num_splits <= HOPPER.num_sms


def test_context_decides_whether_a_row_is_shared_and_not_among_how_many() -> None:
    for num_programs in range(1, 300):
        assert len({splits(num_programs, num_segments) for num_segments in range(1, MAX_SEGMENTS + 1)} - {1}) <= 1


def test_a_row_of_one_segment_is_not_shared() -> None:
    assert all(splits(num_programs, 1) == 1 for num_programs in range(1, 300))


@pytest.mark.parametrize(
    ("num_programs", "num_segments", "is_shared"),
    [
        (8, 2, True),
        (12, 8, True),
        (16, 3, True),
        (16, 8, True),
        (32, 2, False),
        (32, 3, True),
        (32, 9, True),
        (60, 2, False),
        (60, 3, False),
        (60, 5, False),
        (72, 9, False),
        (116, 9, False),
    ],
)
def test_a_row_is_shared_where_that_was_measured_to_be_faster(
    num_programs: int, num_segments: int, is_shared: bool
) -> None:
    assert (splits(num_programs, num_segments) > 1) == is_shared
