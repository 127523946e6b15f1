"""What a runner says of a guide, as the tokenizer hears it."""

from collections import Counter

import hypothesis.strategies as st
import pytest
from hypothesis import given

from triode.actors.executor.guides import MAX_UNASKED, REQUESTS_PER_CHECK, KeptGuides, refusal
from triode.errors import EngineBusy
from triode.models.guide import Guide, Refusal, Regex
from worker_runners import EchoRunner


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (None, None),
        (ValueError("guide cannot be compiled: too large"), Refusal("guide cannot be compiled: too large")),
        (EngineBusy("too many guides"), Refusal("too many guides", is_busy=True)),
        (RuntimeError("the compiler broke"), Refusal("guide cannot be compiled: RuntimeError('the compiler broke')")),
    ],
)
def test_any_failure_to_compile_is_the_callers(error: Exception | None, reason: Refusal | None) -> None:
    class Runner(EchoRunner):
        def check_guide(self, guide: Guide, num_requests: int = 1) -> None:
            if error is not None:
                raise error

    assert refusal(Runner(), Regex("a")) == reason


runs = st.tuples(st.sampled_from("ab"), st.booleans(), st.integers(1, 40))


@given(st.lists(runs, max_size=12))
def test_the_worker_keeps_a_guide_for_as_many_requests_as_have_it_and_few_more(
    runs: list[tuple[str, bool, int]],
) -> None:
    steps = [(name, begins) for name, begins, times in runs for _ in range(times)]
    kept, held, asked = KeptGuides(), Counter[str](), Counter[str]()
    for name, begins in steps:
        guide = Regex(name)
        if begins:
            if not kept.share(guide):
                kept.keep(guide)
                asked[name] += 1
            held[name] += 1
        elif held[name]:
            held[name] -= 1
            asked[name] -= kept.release(guide)
            most = -(-held[name] // REQUESTS_PER_CHECK) + 1 if held[name] else 0
            assert asked[name] <= most
        assert asked[name] * REQUESTS_PER_CHECK >= held[name]


def test_of_many_requests_with_one_guide_the_worker_sees_a_few() -> None:
    kept, num_asked = KeptGuides(), 0
    for _ in range(64):
        if not kept.share(Regex("a")):
            kept.keep(Regex("a"))
            num_asked += 1
    assert num_asked == 64 / (1 + MAX_UNASKED)
