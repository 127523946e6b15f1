"""Which tile `linear/gpu.py` uses for a weight and a number of tokens: a table of what was measured, and a rule.

Every tile gives the same bits, so an entry is only ever a matter of speed. Measured on an H100 80GB HBM3 by
`benchmarks/gpu_kernels.py --sweep`; a shape that is not in the table takes the rule's tile.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class LinearTile:
    """The share of one program, and how it is compiled."""

    rows: int
    """Weight rows (out features); with SwiGLU as many gates and as many ups."""
    tokens: int
    """A multiple of 16."""
    features: int
    """In features a step of the loop."""
    num_warps: int
    num_stages: int
    prefetch_features: int = 0
    """Features of each row that L2 is asked for before the predecessor has finished: 0 or a power of two >= 64."""


TRITON_TOKENS = 32
"""Up to this many tokens the sequential kernel is at least as fast as cuBLASLt, which slows down when it may not split K."""

MEASURED: dict[tuple[int, int], dict[int, LinearTile]] = {
    # Qwen2.5-7B: qkv, o, down.
    (4608, 3584): {16: LinearTile(16, 16, 512, 1, 3)},
    (3584, 3584): {16: LinearTile(64, 16, 128, 4, 6)},
    (3584, 18944): {16: LinearTile(64, 16, 128, 4, 8)},
}
"""(out features, in features) → {most tokens: tile}."""

MEASURED_SWIGLU: dict[tuple[int, int], dict[int, LinearTile]] = {}
"""The same for gate-up products with SwiGLU; out features are those of one half."""


def linear_tile(out_features: int, in_features: int, num_tokens: int) -> LinearTile:
    """The tile of a plain product."""
    measured = _smallest_that_holds(MEASURED.get((out_features, in_features), {}), num_tokens)
    if measured is not None:
        return measured
    if num_tokens > 64:
        return LinearTile(128, 128, 64, 8, 3)
    if num_tokens > 16:
        return LinearTile(64, 32 if num_tokens <= 32 else 64, 128, 4, 4)
    if out_features >= 16384:
        return LinearTile(16, 16, min(512, _divisor(in_features)), 1, 3)
    if out_features >= 3072:
        return LinearTile(64, 16, min(128, _divisor(in_features)), 4, 6)
    return LinearTile(16, 16, min(256, _divisor(in_features)), 1, 4)


def swiglu_tile(out_features: int, in_features: int, num_tokens: int) -> LinearTile:
    """The tile of a gate-up product with SwiGLU."""
    measured = _smallest_that_holds(MEASURED_SWIGLU.get((out_features, in_features), {}), num_tokens)
    if measured is not None:
        return measured
    if num_tokens > 64:
        return LinearTile(64, 128, 64, 8, 3)
    if num_tokens > 16:
        return LinearTile(32, 32 if num_tokens <= 32 else 64, 128, 4, 4)
    return LinearTile(16, 16, min(256, _divisor(in_features)), 1, 3)


def _smallest_that_holds(by_tokens: dict[int, LinearTile], num_tokens: int) -> LinearTile | None:
    return next((by_tokens[most] for most in sorted(by_tokens) if num_tokens <= most), None)


def _divisor(in_features: int) -> int:
    """The largest power of two that divides the in features, at least 64: such steps need no mask."""
    return max(64, in_features & -in_features)
