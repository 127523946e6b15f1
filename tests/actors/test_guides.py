"""What a runner says of a guide, as the tokenizer hears it."""

import pytest

from triode.actors.executor.guides import refusal
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
        def check_guide(self, guide: Guide) -> None:
            if error is not None:
                raise error

    assert refusal(Runner(), Regex("a")) == reason
