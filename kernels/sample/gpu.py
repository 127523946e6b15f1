"""From logits to tokens on an NVIDIA GPU, for rows of every kind at once: greedy, drawn, truncated.

The tokens are those of `reference.py`: the draw inverts a cumulative distribution of integer weights, so no order of
summation can change a token, and a row's result is a function of the row. Probabilities are float32, with sums taken
block by block in one fixed order; a CPU's may differ from them in the last bit, hence a token may where its weight does.

Four kernels, in `draw.py` and `truncate.py`, the first two over (row, block of the vocabulary):

    peaks      maximum, its first token, and the sum of exponentials of each block
    weigh      integer weight of each block; probabilities replace the logits of rows that top_k or top_p truncates
    truncate   the least probability such rows keep, and their weights once more
    choose     the token of each row, by one random number; the slot's last token and position advance

Rows that are not truncated leave `truncate` at once.

    R rows    S slots    V vocabulary    X blocks of BLOCK_TOKENS tokens
"""

import dataclasses

import torch
import triton

from triode.kernels.gpu_traits import GpuTraits
from triode.kernels.philox.reference import TOKEN
from triode.kernels.sample.draw import choose, peaks, weigh
from triode.kernels.sample.truncate import truncate

BLOCK_TOKENS = 2048
FORBIDDEN = -1
"""The token of a row whose every logit is -inf."""
NOT_FINITE = -2
"""The token of a row with a NaN or +inf."""


@dataclasses.dataclass(frozen=True)
class SlotColumns:
    """What the kernels read and write of each slot; S entries each."""

    last_token_S: torch.Tensor
    """int32: the newest token, whose KV entry is not computed yet."""
    position_S: torch.Tensor
    """int32: that token's position."""
    seed_S: torch.Tensor
    """int64, the unsigned seed's bits."""
    sample_index_S: torch.Tensor
    """int32."""
    temperature_S: torch.Tensor
    """float32; 0 takes the most probable token."""
    top_k_S: torch.Tensor
    """int32; 0 keeps all."""
    top_p_S: torch.Tensor
    """float64; 1 keeps all."""
    min_p_S: torch.Tensor
    """float64; 0 keeps all."""


@dataclasses.dataclass(frozen=True)
class SampleWorkspace:
    """What the four kernels leave for one another. Serves one stream."""

    peak_RX: torch.Tensor
    mass_RX: torch.Tensor
    best_RX: torch.Tensor
    weight_RX: torch.Tensor
    key_R: torch.Tensor
    cutoff_R: torch.Tensor

    @classmethod
    def allocate(cls, max_rows: int, vocab_size: int, device: torch.device) -> "SampleWorkspace":
        """Room for so many rows."""
        size = (max_rows, triton.cdiv(vocab_size, BLOCK_TOKENS))
        return cls(
            peak_RX=torch.empty(size, dtype=torch.float32, device=device),
            mass_RX=torch.empty(size, dtype=torch.float32, device=device),
            best_RX=torch.empty(size, dtype=torch.int32, device=device),
            weight_RX=torch.empty(size, dtype=torch.int64, device=device),
            key_R=torch.empty(max_rows, dtype=torch.int32, device=device),
            cutoff_R=torch.empty(max_rows, dtype=torch.int32, device=device),
        )


@dataclasses.dataclass(frozen=True)
class _Rows:
    """The rows of one launch, and what all four kernels are told of them."""

    logits_RV: torch.Tensor
    slot_R: torch.Tensor
    columns: SlotColumns
    workspace: SampleWorkspace
    traits: GpuTraits

    @property
    def num_blocks(self) -> int:
        return -(-self.logits_RV.shape[1] // BLOCK_TOKENS)

    @property
    def options(self) -> dict[str, object]:
        return {
            "VOCAB": self.logits_RV.shape[1],
            "NUM_BLOCKS": self.num_blocks,
            "BLOCK": BLOCK_TOKENS,
            "PDL": self.traits.dependent_launch,
            **self.traits.launch_options,
        }

    @property
    def padded_blocks(self) -> int:
        """A power of two: one program sees the sums of all blocks."""
        return 1 << (self.num_blocks - 1).bit_length()

    @property
    def truncation(self) -> tuple[torch.Tensor, ...]:
        return (self.columns.top_k_S, self.columns.top_p_S, self.columns.min_p_S)

    @property
    def reduced(self) -> tuple[torch.Tensor, ...]:
        return (self.workspace.peak_RX, self.workspace.mass_RX)

    def reduce_blocks(self) -> None:
        """`peaks`, then `weigh`."""
        grid = (len(self.logits_RV), self.num_blocks)
        temperature_S, stride = self.columns.temperature_S, self.logits_RV.stride(0)
        peaks[grid](
            self.logits_RV,
            self.slot_R,
            temperature_S,
            *self.reduced,
            self.workspace.best_RX,
            stride,
            num_warps=4,
            **self.options,
        )
        weigh[grid](
            self.logits_RV,
            self.slot_R,
            temperature_S,
            *self.truncation,
            *self.reduced,
            self.workspace.weight_RX,
            stride,
            BLOCKS=self.padded_blocks,
            num_warps=4,
            **self.options,
        )

    def truncate(self) -> None:
        workspace = self.workspace
        truncate[(len(self.logits_RV),)](
            self.logits_RV,
            self.slot_R,
            self.columns.temperature_S,
            *self.truncation,
            *self.reduced,
            workspace.weight_RX,
            workspace.key_R,
            workspace.cutoff_R,
            self.logits_RV.stride(0),
            BLOCKS=self.padded_blocks,
            TILE=min(8192, triton.next_power_of_2(self.logits_RV.shape[1])),
            num_warps=16,
            **self.options,
        )

    def choose(self, end_R: torch.Tensor, token_R: torch.Tensor, nobody: int) -> None:
        columns, workspace = self.columns, self.workspace
        choose[(len(self.logits_RV),)](
            self.logits_RV,
            self.slot_R,
            end_R,
            columns.temperature_S,
            *self.truncation,
            columns.seed_S,
            columns.sample_index_S,
            *self.reduced,
            workspace.best_RX,
            workspace.weight_RX,
            workspace.key_R,
            workspace.cutoff_R,
            columns.last_token_S,
            columns.position_S,
            token_R,
            self.logits_RV.stride(0),
            nobody,
            PURPOSE=TOKEN,
            BLOCKS=self.padded_blocks,
            num_warps=8,
            **self.options,
        )


def sample(
    logits_RV: torch.Tensor,
    slot_R: torch.Tensor,
    end_R: torch.Tensor,
    columns: SlotColumns,
    workspace: SampleWorkspace,
    token_R: torch.Tensor,
    nobody: int,
    traits: GpuTraits,
) -> None:
    """Write each row's token, FORBIDDEN or NOT_FINITE into `token_R`, and advance the rows' slots.

    Args:
        logits_RV: float32, contiguous along V; overwritten where a row is truncated.
        slot_R: int32, the slot of each row.
        end_R: int32, the position that the new token takes: it is also the draw's place in its sequence.
        nobody: the slot of padding rows, which does not advance.
    """
    rows = _Rows(logits_RV, slot_R, columns, workspace, traits)
    rows.reduce_blocks()
    rows.truncate()
    rows.choose(end_R, token_R, nobody)
