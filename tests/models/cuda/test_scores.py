import pytest
import torch

pytest.importorskip("triton")

from triode.models.cuda.scores import most_probable


@pytest.mark.parametrize("num", [1, 3, 10])
def test_alternatives_descend_and_equals_come_by_id(num: int) -> None:
    logprobs = torch.randint(-4, 0, (20, 30), generator=torch.Generator().manual_seed(num)).float()
    got = most_probable(logprobs, num)
    for row, ids in zip(logprobs.tolist(), got.tolist(), strict=True):
        assert ids == sorted(range(30), key=lambda token: (-row[token], token))[:num]


def test_every_token_may_be_asked_for() -> None:
    logprobs = torch.tensor([[0.0, -0.0, -torch.inf, -1.0]])
    assert most_probable(logprobs, 4).tolist() == [[0, 1, 3, 2]]
