import pytest
import torch

from triode.kernels.gpu_traits import INTERPRETER
from triode.kernels.philox import reference as philox
from triode.kernels.sample import reference
from triode.kernels.sample.gpu import FORBIDDEN, NOT_FINITE, SampleWorkspace, SlotColumns, sample

NOBODY = 3


def columns(
    num_rows: int, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> SlotColumns:
    """Slots 0, 2, 4, ... are in use."""
    num_slots = 2 * num_rows + 4

    def filled(value: float, dtype: torch.dtype) -> torch.Tensor:
        return torch.full((num_slots,), value, dtype=dtype)

    return SlotColumns(
        last_token_S=filled(-7, torch.int32),
        position_S=filled(-7, torch.int32),
        seed_S=torch.arange(num_slots) * 0x1234567890123 - 5,
        sample_index_S=torch.arange(num_slots, dtype=torch.int32) % 3,
        temperature_S=filled(temperature, torch.float32),
        top_k_S=filled(top_k, torch.int32),
        top_p_S=filled(top_p, torch.float64),
        min_p_S=filled(min_p, torch.float64),
    )


def run(logits: torch.Tensor, slots: SlotColumns, slot_R: torch.Tensor | None = None) -> torch.Tensor:
    num_rows = len(logits)
    workspace = SampleWorkspace.allocate(num_rows, logits.shape[1], torch.device("cpu"))
    token_R = torch.full((num_rows,), -99, dtype=torch.int32)
    slot_R = 2 * torch.arange(num_rows, dtype=torch.int32) if slot_R is None else slot_R
    end_R = 10 + torch.arange(num_rows, dtype=torch.int32)
    sample(logits.clone(), slot_R, end_R, slots, workspace, token_R, NOBODY, INTERPRETER)
    return token_R


def expected(logits: torch.Tensor, slots: SlotColumns) -> torch.Tensor:
    slot_R = 2 * torch.arange(len(logits))
    uniform = philox.uniform(slots.seed_S[slot_R], slots.sample_index_S[slot_R].long(), 10 + torch.arange(len(logits)))
    return reference.draw(
        logits.clone(),
        uniform,
        slots.temperature_S[slot_R],
        slots.top_k_S[slot_R].long(),
        slots.top_p_S[slot_R],
        slots.min_p_S[slot_R],
    )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.6},
        {"top_k": 1},
        {"top_k": 5, "temperature": 2.0},
        {"top_p": 0.5},
        {"top_p": 0.9, "temperature": 0.3},
        {"top_k": 40, "top_p": 0.8},
        {"min_p": 0.1},
        {"top_k": 50, "top_p": 0.95, "min_p": 0.02, "temperature": 1.5},
        {"top_k": 100_000},
        {"top_p": 1e-9},
    ],
)
def test_the_tokens_are_those_of_the_reference(options: dict[str, float]) -> None:
    logits = torch.randn(3, 4999, generator=torch.Generator().manual_seed(1)) * 3
    slots = columns(3, **options)  # type: ignore[arg-type]
    got = run(logits, slots)
    assert got.tolist() == expected(logits, slots).tolist()
    assert slots.last_token_S[[0, 2, 4]].tolist() == got.tolist()
    assert slots.position_S[:5].tolist() == [10, -7, 11, -7, 12]


@pytest.mark.parametrize(("top_k", "top_p"), [(1, 1.0), (2, 1.0), (7, 0.6), (3, 0.3), (0, 0.3)])
def test_among_equals_the_lowest_tokens_are_kept(top_k: int, top_p: float) -> None:
    logits = torch.full((4, 3000), -20.0)
    logits[:, [3, 700, 2100, 2900]] = 2.0
    logits[:, [50, 2500]] = 1.0
    slots = columns(4, top_k=top_k, top_p=top_p)
    assert run(logits, slots).tolist() == expected(logits, slots).tolist()


def test_greedy_takes_the_lowest_of_equals() -> None:
    logits = torch.randn(3, 5000)
    logits[0, [4100, 17, 2048]] = 9.0
    logits[1, 4999] = 9.0
    slots = columns(3, temperature=0.0)
    assert run(logits, slots).tolist() == [17, 4999, int(logits[2].argmax())]


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize(("temperature", "top_k"), [(0.0, 0), (0.7, 0), (0.7, 3)])
def test_a_row_without_a_possible_token_says_why_and_leaves_its_slot_usable(temperature: float, top_k: int) -> None:
    logits = torch.randn(4, 2500)
    logits[0] = -torch.inf
    logits[1, 2400] = torch.nan
    logits[2, 3] = torch.inf
    slots = columns(4, temperature=temperature, top_k=top_k)
    got = run(logits, slots).tolist()
    assert got[:3] == [FORBIDDEN, NOT_FINITE, NOT_FINITE]
    assert got[3] >= 0
    assert slots.last_token_S[[0, 2, 4]].tolist() == [0, 0, 0]


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    logits = torch.randn(3, 3000)
    slots = columns(3, top_p=0.9)
    slots.temperature_S[0] = 0.0
    slots.top_k_S[4] = 20
    together = run(logits, slots)
    for row in range(3):
        alone = logits.clone()
        alone[torch.arange(3) != row] = 0.0
        assert run(alone, slots)[row] == together[row]


def test_padding_rows_advance_nobody() -> None:
    slots = columns(2, temperature=0.0)
    run(torch.randn(2, 100), slots, torch.tensor([2, NOBODY], dtype=torch.int32))
    assert slots.position_S.tolist() == [-7, -7, 10, -7, -7, -7, -7, -7]
