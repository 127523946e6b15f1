import numpy as np
import pytest
import torch

from triode.kernels.gpu_traits import INTERPRETER
from triode.kernels.guide_mask import gpu, reference


@pytest.mark.parametrize(("vocab_size", "num_words"), [(31, 1), (499, 16), (4097, 140), (9000, 300)])
def test_the_mask_leaves_what_the_reference_leaves(vocab_size: int, num_words: int) -> None:
    random = np.random.default_rng(vocab_size)
    mask_GW = random.integers(-(2**31), 2**31, (3, num_words), np.int32)
    mask_GW[1] = 0
    row_G = np.array([4, 0, 2], np.int32)
    # Rows of a buffer that is wider than the vocabulary.
    buffer = torch.from_numpy(random.standard_normal((5, vocab_size + 7), np.float32))
    want, got = buffer.clone(), buffer.clone()
    reference.forbid(want[:, :vocab_size], mask_GW, row_G)
    gpu.forbid(got[:, :vocab_size], torch.from_numpy(mask_GW), torch.from_numpy(row_G), INTERPRETER)
    assert torch.equal(got, want)
    assert torch.equal(got[[1, 3]], buffer[[1, 3]])
    assert got[0, :vocab_size].isinf().all()
