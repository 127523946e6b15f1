"""Which query tile, KV head and part of the KV a program of attention has: what all kernels of it agree on.

T packed query tokens    R rows of the batch    H head dim    M (query token, head) pairs of a program
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from typing import NamedTuple

import triton
import triton.language as tl


@triton.jit
def row_of_tile(query_start_ptr, tile, num_rows, QUERY_TOKENS: tl.constexpr, CACHE: tl.constexpr):
    """The row that owns a query tile. Row r's tiles begin at `query_start[r] // QUERY_TOKENS + r`."""
    low = 0
    high = num_rows
    while low < high:
        middle = (low + high) // 2
        row_start = tl.load(query_start_ptr + middle, cache_modifier=CACHE)
        if row_start // QUERY_TOKENS + middle <= tile:
            low = middle + 1
        else:
            high = middle
    return low - 1


@triton.jit
def locate(
    query_start_ptr,
    tile,
    num_rows,
    QUERY_TOKENS: tl.constexpr,
    LONG_ROWS: tl.constexpr,
    CACHE: tl.constexpr,
):
    """Of a query tile: its row, the row's first token among the packed ones and how many it has, its own first in the row."""
    row = tile
    if LONG_ROWS:
        row = row_of_tile(query_start_ptr, tile, num_rows, QUERY_TOKENS, CACHE)
    row_start = tl.load(query_start_ptr + row, cache_modifier=CACHE)
    first_token = 0
    if LONG_ROWS:
        first_token = (tile - (row_start // QUERY_TOKENS + row)) * QUERY_TOKENS
    num_tokens = tl.load(query_start_ptr + row + 1, cache_modifier=CACHE) - row_start
    return row, row_start, num_tokens, first_token


@triton.jit
def kv_of_tile(
    start_position,
    first_token,
    num_tokens,
    QUERY_TOKENS: tl.constexpr,
    TILE: tl.constexpr,
    SEGMENT: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """Where a query tile's KV begins and ends, its first segment and how many there are."""
    end = start_position + tl.minimum(first_token + QUERY_TOKENS, num_tokens)
    begin = 0
    if WINDOW > 0:
        begin = tl.maximum(start_position + first_token - WINDOW + 1, 0) // TILE * TILE
    first_segment = begin // SEGMENT
    return begin, end, first_segment, (end + SEGMENT - 1) // SEGMENT - first_segment


@triton.jit
def share_of_kv(begin, end, first_segment, num_segments, which, num_shares, SEGMENT: tl.constexpr):
    """The part of a query tile's KV that is the share `which` of so many, and how many have one.

    The others are empty: they end before they begin.
    """
    share = (num_segments + num_shares - 1) // num_shares
    my_segment = first_segment + which * share
    begin = tl.maximum(begin, my_segment * SEGMENT)
    return begin, tl.minimum(end, (my_segment + share) * SEGMENT), (num_segments + share - 1) // share


class Pairs(NamedTuple):
    """The (query token, head) pairs of a program; M each."""

    number: tl.tensor
    """In the query tile."""
    token: tl.tensor
    """In the row."""
    head: tl.tensor
    valid: tl.tensor
    """Whether there is such a pair."""


@triton.jit
def pairs_of_tile(
    first_pair, first_token, num_tokens, kv_head, GROUP: tl.constexpr, QUERY_TOKENS: tl.constexpr, PAIRS: tl.constexpr
):
    """PAIRS pairs of a query tile, the first of them `first_pair`: a KV head's query heads share its keys."""
    number = first_pair + tl.arange(0, PAIRS)
    token = first_token + number // GROUP
    valid = (number < QUERY_TOKENS * GROUP) & (token < num_tokens)
    return Pairs(number, token, kv_head * GROUP + number % GROUP, valid)


@triton.jit
def offset_of_pairs(pairs, row_start, dim, stride, HEAD: tl.constexpr):
    """Where the queries or outputs of pairs are, M x H."""
    token = (row_start + pairs.token).to(tl.int64)
    return token[:, None] * stride + pairs.head[:, None] * HEAD + dim[None, :]
