"""From logits to tokens on an NVIDIA GPU, for rows of every kind at once: greedy, drawn, truncated.

The tokens are those of `reference.py`: the draw inverts a cumulative distribution of integer weights, so no order of
summation can change a token, and a row's result is a function of the row. Probabilities are float32, with sums taken
block by block in one fixed order; a CPU's may differ from them in the last bit, hence a token may where its weight does.

Four kernels, the first two over (row, block of the vocabulary):

    peaks      maximum, its first token, and the sum of exponentials of each block
    weigh      integer weight of each block; probabilities replace the logits of rows that top_k or top_p truncates
    truncate   the least probability such rows keep, found by bisection over float bits, and their weights once more
    choose     the token of each row, by one random number; the slot's last token and position advance

Bisection needs no sort and no scratch memory: positive floats are ordered as their bits are, so 29 passes over a row
that sits in L2 find the least kept probability exactly. Rows that are not truncated return at once.

    R rows    S slots    V vocabulary    X blocks of BLOCK_TOKENS tokens
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import dataclasses

import torch
import triton
import triton.language as tl

from triode.kernels.device_code import wait_for_inputs
from triode.kernels.gpu_traits import GpuTraits
from triode.kernels.philox.gpu import uniform
from triode.kernels.philox.reference import TOKEN

BLOCK_TOKENS = 2048
FORBIDDEN = -1
"""The token of a row whose every logit is -inf."""
NOT_FINITE = -2
"""The token of a row with a NaN or +inf."""

WEIGHT_SCALE = tl.constexpr(2.0**40)
# Bits of 2**-40, below which a probability has no weight, and of the float32 after 1.
LEAST_KEY = tl.constexpr(0x2B800000)
PAST_KEYS = tl.constexpr(0x3F800001)


@triton.jit
def peaks(
    logits_ptr,
    slot_ptr,
    temperature_ptr,
    peak_ptr,
    mass_ptr,
    best_ptr,
    logits_stride,
    VOCAB: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Maximum of one block of one row, its lowest token, and the sum of exponentials (NaN where a logit is broken)."""
    wait_for_inputs(PDL)
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    temperature = tl.load(temperature_ptr + tl.load(slot_ptr + row))
    token = block * BLOCK + tl.arange(0, BLOCK)
    real = token < VOCAB
    logit = tl.load(logits_ptr + row * logits_stride + token, mask=real, other=-float("inf"))
    is_broken = tl.max(((logit != logit) | (logit == float("inf"))).to(tl.int32), 0) > 0
    if temperature > 0:
        logit = tl.div_rn(logit, tl.full([BLOCK], 1.0, tl.float32) * temperature)
    peak = tl.max(logit, 0)
    mass = 0.0
    if (temperature > 0) & (peak > -float("inf")):
        mass = tl.sum(tl.exp(logit - peak), 0)
    if is_broken:
        mass = float("nan")
    at = row * NUM_BLOCKS + block
    tl.store(peak_ptr + at, peak)
    tl.store(mass_ptr + at, mass)
    tl.store(best_ptr + at, tl.min(tl.where((logit == peak) & real, token, VOCAB), 0))


@triton.jit
def row_peak_and_mass(peak_ptr, mass_ptr, row, NUM_BLOCKS: tl.constexpr, BLOCKS: tl.constexpr):
    """Maximum and sum of exponentials of a whole row; the sum is NaN where the row is broken."""
    block = tl.arange(0, BLOCKS)
    peak_X = tl.load(peak_ptr + row * NUM_BLOCKS + block, mask=block < NUM_BLOCKS, other=-float("inf"))
    mass_X = tl.load(mass_ptr + row * NUM_BLOCKS + block, mask=block < NUM_BLOCKS, other=0.0)
    peak = tl.max(peak_X, 0)
    # An empty block's peak is -inf, and so may be the row's: the difference would be NaN.
    scale_X = tl.where(peak_X > -float("inf"), tl.exp(peak_X - peak), 0.0)
    return peak, tl.sum(mass_X * scale_X, 0), tl.max((mass_X != mass_X).to(tl.int32), 0) > 0


@triton.jit
def probability(logit, temperature, peak, mass, BLOCK: tl.constexpr):
    """Softmax, each operation rounded once."""
    ones = tl.full([BLOCK], 1.0, tl.float32)
    return tl.div_rn(tl.exp(tl.div_rn(logit, ones * temperature) - peak), ones * mass)


@triton.jit
def kept_weight(p, token, key, cutoff, least):
    """Integer weights of what the truncations keep: bits above `key`, equal to it up to token `cutoff`, >= `least`."""
    bits = p.to(tl.int32, bitcast=True)
    kept = (bits > key) | ((bits == key) & (token <= cutoff))
    kept = kept & (p.to(tl.float64) >= least)
    return tl.where(kept, (p * WEIGHT_SCALE).to(tl.int64), 0)


@triton.jit
def is_truncated(top_k, top_p, VOCAB: tl.constexpr):
    """Whether top_k or top_p leaves something out."""
    return ((top_k > 0) & (top_k < VOCAB)) | (top_p < 1.0)


@triton.jit
def least_probability(min_p, mass):
    """What min_p asks for: a share of the greatest probability, 1 / mass."""
    return min_p * tl.div_rn(1.0, mass).to(tl.float64)


@triton.jit
def weigh(
    logits_ptr,
    slot_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    peak_ptr,
    mass_ptr,
    weight_ptr,
    logits_stride,
    VOCAB: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    PDL: tl.constexpr,
):
    """The weight of one block of one row; the probabilities themselves where the row is truncated."""
    wait_for_inputs(PDL)
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    slot = tl.load(slot_ptr + row)
    temperature = tl.load(temperature_ptr + slot)
    if temperature == 0:
        return
    peak, mass, is_broken = row_peak_and_mass(peak_ptr, mass_ptr, row, NUM_BLOCKS, BLOCKS)
    if is_broken | (peak == -float("inf")):
        return
    token = block * BLOCK + tl.arange(0, BLOCK)
    at = logits_ptr + row * logits_stride + token
    logit = tl.load(at, mask=token < VOCAB, other=-float("inf"))
    p = probability(logit, temperature, peak, mass, BLOCK)
    if is_truncated(tl.load(top_k_ptr + slot), tl.load(top_p_ptr + slot), VOCAB):
        tl.store(at, p, mask=token < VOCAB)
    else:
        least = least_probability(tl.load(min_p_ptr + slot), mass)
        tl.store(weight_ptr + row * NUM_BLOCKS + block, tl.sum(kept_weight(p, token, 0, 0, least), 0))


@triton.jit
def above(p_ptr, key, VOCAB: tl.constexpr, TILE: tl.constexpr):
    """How many probabilities of a row have at least the bits `key`, and what they weigh."""
    lane = tl.arange(0, TILE)
    count = tl.zeros([TILE], tl.int32)
    weight = tl.zeros([TILE], tl.int64)
    for first in range(0, VOCAB, TILE):
        p = tl.load(p_ptr + first + lane, mask=first + lane < VOCAB, other=0.0)
        is_above = p.to(tl.int32, bitcast=True) >= key
        count += is_above.to(tl.int32)
        weight += tl.where(is_above, (p * WEIGHT_SCALE).to(tl.int64), 0)
    return tl.sum(count, 0), tl.sum(weight, 0)


@triton.jit
def truncate(
    p_ptr,
    slot_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    peak_ptr,
    mass_ptr,
    weight_ptr,
    key_ptr,
    cutoff_ptr,
    p_stride,
    VOCAB: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    TILE: tl.constexpr,
    PDL: tl.constexpr,
):
    """The least probability that top_k and top_p keep of one row, the last token among its equals, and the weights."""
    wait_for_inputs(PDL)
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_ptr + row)
    top_k = tl.load(top_k_ptr + slot)
    top_p = tl.load(top_p_ptr + slot)
    if (tl.load(temperature_ptr + slot) == 0) | (is_truncated(top_k, top_p, VOCAB) == 0):
        return
    peak, mass, is_broken = row_peak_and_mass(peak_ptr, mass_ptr, row, NUM_BLOCKS, BLOCKS)
    if is_broken | (peak == -float("inf")):
        return
    p_row = p_ptr + row * p_stride

    # Of the tokens that weigh `key`, the first `num_equals` are kept.
    key = LEAST_KEY + 0
    num_equals = VOCAB + 0
    total = tl.full([], 1, tl.int64) << 40
    if (top_k > 0) & (top_k < VOCAB):
        past = PAST_KEYS + 0
        while past - key > 1:
            middle = (key + past) // 2
            count, weight = above(p_row, middle, VOCAB, TILE)
            key, past = tl.where(count >= top_k, middle, key), tl.where(count >= top_k, past, middle)
        count_above, weight_above = above(p_row, key + 1, VOCAB, TILE)
        count_all, weight_all = above(p_row, key, VOCAB, TILE)
        num_equals = tl.minimum(top_k, count_all) - count_above
        equal_weight = (weight_all - weight_above) // tl.maximum(count_all - count_above, 1)
        total = weight_above + num_equals.to(tl.int64) * equal_weight
    if top_p < 1.0:
        goal = top_p * total.to(tl.float64)
        low = key + 0
        past = PAST_KEYS + 0
        _, weight_low = above(p_row, low, VOCAB, TILE)
        # Where rounding down has left all weights together short of the goal, nothing is left out.
        if weight_low.to(tl.float64) >= goal:
            while past - low > 1:
                middle = (low + past) // 2
                count, weight = above(p_row, middle, VOCAB, TILE)
                reaches = weight.to(tl.float64) >= goal
                low, past = tl.where(reaches, middle, low), tl.where(reaches, past, middle)
            count_above, weight_above = above(p_row, low + 1, VOCAB, TILE)
            count_all, weight_all = above(p_row, low, VOCAB, TILE)
            equal_weight = (weight_all - weight_above) // tl.maximum(count_all - count_above, 1)
            # A quotient of float64 may be one off: start below, and step up while the goal is not reached.
            enough = ((goal - weight_above.to(tl.float64)) / equal_weight.to(tl.float64)).to(tl.int64) - 1
            enough = tl.maximum(enough, 1)
            for step in tl.static_range(3):  # noqa: B007 - a name that no branch gives another type
                enough += ((weight_above + enough * equal_weight).to(tl.float64) < goal).to(tl.int64)
            # What top_k leaves of the equals of its own least probability limits top_p too.
            room = tl.where(low > key, enough.to(tl.int32), num_equals)
            num_equals = tl.minimum(room, enough.to(tl.int32))
            key = low

    least = least_probability(tl.load(min_p_ptr + slot), mass)
    cutoff = -1
    num_seen = 0
    for block in range(NUM_BLOCKS):
        token = block * BLOCK + tl.arange(0, BLOCK)
        p = tl.load(p_row + token, mask=token < VOCAB, other=0.0)
        is_equal = (p.to(tl.int32, bitcast=True) == key).to(tl.int32)
        rank = num_seen + tl.cumsum(is_equal, 0)
        cutoff = tl.maximum(cutoff, tl.max(tl.where((is_equal > 0) & (rank <= num_equals), token, -1), 0))
        num_seen += tl.sum(is_equal, 0)
        # The cutoff of the tokens so far serves: what comes after it in this block is kept by no rank.
        tl.store(weight_ptr + row * NUM_BLOCKS + block, tl.sum(kept_weight(p, token, key, cutoff, least), 0))
    tl.store(key_ptr + row, key)
    tl.store(cutoff_ptr + row, cutoff)


@triton.jit
def choose(
    logits_ptr,
    slot_ptr,
    end_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    seed_ptr,
    sample_index_ptr,
    peak_ptr,
    mass_ptr,
    best_ptr,
    weight_ptr,
    key_ptr,
    cutoff_ptr,
    last_token_ptr,
    position_ptr,
    token_ptr,
    logits_stride,
    nobody,
    VOCAB: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    PURPOSE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    PDL: tl.constexpr,
):
    """The token of one row, which becomes its slot's last one, at position `end`."""
    wait_for_inputs(PDL)
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_ptr + row)
    end = tl.load(end_ptr + row)
    temperature = tl.load(temperature_ptr + slot)
    peak, mass, is_broken = row_peak_and_mass(peak_ptr, mass_ptr, row, NUM_BLOCKS, BLOCKS)
    block_X = tl.arange(0, BLOCKS)
    chosen = VOCAB * 0
    if is_broken:
        chosen = chosen - 2
    elif peak == -float("inf"):
        chosen = chosen - 1
    elif temperature == 0:
        in_row = block_X < NUM_BLOCKS
        peak_X = tl.load(peak_ptr + row * NUM_BLOCKS + block_X, mask=in_row, other=-float("inf"))
        best_X = tl.load(best_ptr + row * NUM_BLOCKS + block_X, mask=in_row, other=VOCAB)
        chosen = tl.min(tl.where(peak_X == peak, best_X, VOCAB), 0)
    else:
        weight_X = tl.load(weight_ptr + row * NUM_BLOCKS + block_X, mask=block_X < NUM_BLOCKS, other=0)
        sum_X = tl.cumsum(weight_X, 0)
        draw = uniform(tl.load(seed_ptr + slot), tl.load(sample_index_ptr + slot), end, PURPOSE)
        target = (draw * tl.sum(weight_X, 0).to(tl.float64)).to(tl.int64)
        block = tl.sum((sum_X <= target).to(tl.int32), 0)
        before = tl.sum(tl.where(block_X < block, weight_X, 0), 0)
        token = block * BLOCK + tl.arange(0, BLOCK)
        loaded = tl.load(logits_ptr + row * logits_stride + token, mask=token < VOCAB, other=-float("inf"))
        least = least_probability(tl.load(min_p_ptr + slot), mass)
        if is_truncated(tl.load(top_k_ptr + slot), tl.load(top_p_ptr + slot), VOCAB):
            p = tl.where(token < VOCAB, loaded, 0.0)
            weight = kept_weight(p, token, tl.load(key_ptr + row), tl.load(cutoff_ptr + row), least)
        else:
            p = probability(loaded, temperature, peak, mass, BLOCK)
            weight = kept_weight(p, token, 0, 0, least)
        inside = before + tl.cumsum(weight, 0)
        chosen = block * BLOCK + tl.sum((inside <= target).to(tl.int32), 0)
    tl.store(token_ptr + row, chosen)
    if slot != nobody:
        # A row without a token has failed. Any token takes its place, because a step that was planned before the
        # scheduler knew goes on from there.
        tl.store(last_token_ptr + slot, tl.maximum(chosen, 0))
        tl.store(position_ptr + slot, end)


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
    num_rows, vocab = logits_RV.shape
    num_blocks = triton.cdiv(vocab, BLOCK_TOKENS)
    blocks = triton.next_power_of_2(num_blocks)
    stride = logits_RV.stride(0)
    truncation = (columns.top_k_S, columns.top_p_S, columns.min_p_S)
    reduced = (workspace.peak_RX, workspace.mass_RX)
    options = {
        "VOCAB": vocab,
        "NUM_BLOCKS": num_blocks,
        "BLOCK": BLOCK_TOKENS,
        "PDL": traits.dependent_launch,
        **traits.launch_options,
    }
    peaks[(num_rows, num_blocks)](
        logits_RV, slot_R, columns.temperature_S, *reduced, workspace.best_RX, stride, num_warps=4, **options
    )
    weigh[(num_rows, num_blocks)](
        logits_RV,
        slot_R,
        columns.temperature_S,
        *truncation,
        *reduced,
        workspace.weight_RX,
        stride,
        BLOCKS=blocks,
        num_warps=4,
        **options,
    )
    truncate[(num_rows,)](
        logits_RV,
        slot_R,
        columns.temperature_S,
        *truncation,
        *reduced,
        workspace.weight_RX,
        workspace.key_R,
        workspace.cutoff_R,
        stride,
        BLOCKS=blocks,
        TILE=min(8192, triton.next_power_of_2(vocab)),
        num_warps=16,
        **options,
    )
    choose[(num_rows,)](
        logits_RV,
        slot_R,
        end_R,
        columns.temperature_S,
        *truncation,
        columns.seed_S,
        columns.sample_index_S,
        *reduced,
        workspace.best_RX,
        workspace.weight_RX,
        workspace.key_R,
        workspace.cutoff_R,
        columns.last_token_S,
        columns.position_S,
        token_R,
        stride,
        nobody,
        PURPOSE=TOKEN,
        BLOCKS=blocks,
        num_warps=8,
        **options,
    )
