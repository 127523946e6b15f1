"""What a step in torch asks of torch: short operations are most of its time, so their number must not grow unseen."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from torch.utils._python_dispatch import TorchDispatchMode

from runner_world import RunnerWorld, Running, tiny_config
from triode.models.step import Output


class Operations(TorchDispatchMode):
    """Counts them by name."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self,
        function: Callable[..., object],
        types: Sequence[type],
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        self.counts[str(function)] += 1
        return function(*args, **(kwargs or {}))


def operations_of_decoding(num_rows: int, num_prompt_tokens: int) -> Counter[str]:
    """Of one step in which each row gets a token."""
    world = RunnerWorld()
    running = [world.admit(slot, [1 + slot] * num_prompt_tokens) for slot in range(num_rows)]

    def decode(rows: Sequence[Running]) -> None:
        world.step(*[(row, len(row.tokens) - row.num_computed, Output.SAMPLE) for row in rows])

    decode(running)
    decode(running)
    found = Operations()
    with found:
        decode(running)
    return found.counts


def test_the_operations_of_a_decode_step_do_not_grow_with_its_rows_or_their_contexts() -> None:
    expected = operations_of_decoding(8, 20)
    assert expected.total() <= 90 * tiny_config().num_layers
    for num_rows, num_prompt_tokens in ((4, 20), (8, 60), (8, 150)):
        assert operations_of_decoding(num_rows, num_prompt_tokens) == expected
