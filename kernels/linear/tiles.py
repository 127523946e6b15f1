"""Which tile `linear/gpu.py` uses for a weight and a number of tokens: a table of what was measured, and a rule.

Every tile gives the same bits, so an entry is only ever a matter of speed. Measured on an H100 80GB HBM3 by
`benchmarks/gpu_tiles.py`; a shape that is not in the table takes the rule's tile.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class LinearTile:
    """The share of one program, and how it is compiled."""

    rows: int
    """Weight rows (out features); with SwiGLU as many gates and as many ups."""
    tokens: int
    """8, or a multiple of 16."""
    features: int
    """In features a step of the loop."""
    num_warps: int
    num_stages: int
    """Steps in flight; fewer where shared memory does not hold them."""
    ahead: int = 0
    """In features whose weights are fetched before the inputs are there: 0 or a power of two."""


TRITON_TOKENS = 32
"""Up to this many tokens every weight uses the sequential kernel: cuBLASLt slows down when it may not split K."""

_ONE_STEP = 1024
"""In features that small models' products fetch in one step, ahead of their inputs."""

MEASURED: dict[tuple[int, int], dict[int, LinearTile]] = {
    # Qwen2.5-7B: qkv, o, down, head.
    (4608, 3584): {
        8: LinearTile(32, 8, 128, 2, 6),
        16: LinearTile(64, 16, 128, 4, 6, ahead=256),
        32: LinearTile(64, 32, 128, 4, 6),
        64: LinearTile(64, 64, 64, 4, 10),
    },
    (3584, 3584): {
        16: LinearTile(64, 16, 128, 4, 8),
        32: LinearTile(64, 32, 128, 4, 6),
        64: LinearTile(64, 64, 64, 4, 10),
    },
    (3584, 18944): {
        8: LinearTile(32, 8, 512, 4, 4),
        16: LinearTile(64, 16, 128, 4, 10),
        32: LinearTile(32, 32, 256, 4, 6),
    },
    (152064, 3584): {
        16: LinearTile(32, 16, 256, 4, 8),
        32: LinearTile(64, 32, 128, 4, 6),
        64: LinearTile(128, 64, 128, 8, 4),
    },
    # Llama-3.1-8B: qkv, o, down, head.
    (6144, 4096): {
        8: LinearTile(32, 8, 256, 2, 3),
        16: LinearTile(64, 16, 128, 4, 6, ahead=256),
        32: LinearTile(64, 32, 128, 4, 6),
        64: LinearTile(64, 64, 128, 4, 5),
    },
    (4096, 4096): {
        8: LinearTile(64, 16, 128, 4, 8),
        16: LinearTile(64, 16, 128, 4, 6, ahead=256),
        32: LinearTile(64, 32, 128, 4, 6),
        64: LinearTile(64, 64, 64, 4, 10),
    },
    (4096, 14336): {16: LinearTile(64, 16, 128, 4, 8), 32: LinearTile(32, 32, 256, 4, 6)},
    (128256, 4096): {
        16: LinearTile(32, 16, 256, 4, 8),
        32: LinearTile(64, 32, 128, 4, 6),
        64: LinearTile(128, 64, 128, 8, 4),
    },
    # Qwen2.5-0.5B: qkv, o, down.
    (1152, 896): {
        8: LinearTile(16, 8, _ONE_STEP, 1, 1, ahead=_ONE_STEP),
        16: LinearTile(16, 16, _ONE_STEP, 2, 1, ahead=_ONE_STEP),
        32: LinearTile(64, 32, 128, 4, 6),
    },
    (896, 896): {
        8: LinearTile(16, 8, _ONE_STEP, 1, 1, ahead=_ONE_STEP),
        16: LinearTile(16, 16, _ONE_STEP, 2, 1, ahead=_ONE_STEP),
        32: LinearTile(64, 32, 128, 4, 6),
    },
    (896, 4864): {
        8: LinearTile(16, 8, 256, 2, 8),
        16: LinearTile(16, 16, 256, 4, 6, ahead=1024),
        32: LinearTile(16, 32, 256, 4, 8, ahead=512),
    },
    # SmolLM2-135M: qkv, o, down.
    (960, 576): {
        8: LinearTile(16, 8, _ONE_STEP, 2, 1, ahead=_ONE_STEP),
        16: LinearTile(16, 16, _ONE_STEP, 2, 1, ahead=_ONE_STEP),
        32: LinearTile(64, 32, 64, 4, 6),
    },
    (576, 576): {
        8: LinearTile(16, 8, _ONE_STEP, 2, 1, ahead=_ONE_STEP),
        16: LinearTile(16, 16, _ONE_STEP, 2, 1, ahead=_ONE_STEP),
        32: LinearTile(64, 32, 64, 4, 6),
    },
    (576, 1536): {
        8: LinearTile(16, 8, 256, 2, 8),
        16: LinearTile(16, 16, 512, 4, 6),
        32: LinearTile(16, 32, 512, 4, 6),
    },
}
"""(out features, in features) → {most tokens: tile}."""

MEASURED_SWIGLU: dict[tuple[int, int], dict[int, LinearTile]] = {
    # Qwen2.5-7B, Llama-3.1-8B, Qwen2.5-0.5B, SmolLM2-135M.
    (18944, 3584): {
        8: LinearTile(16, 8, 256, 2, 4),
        16: LinearTile(32, 16, 128, 2, 4, ahead=128),
        32: LinearTile(32, 32, 128, 2, 4),
        64: LinearTile(64, 64, 64, 4, 6),
    },
    (14336, 4096): {
        8: LinearTile(16, 8, 256, 1, 3, ahead=256),
        16: LinearTile(32, 16, 128, 2, 6),
        32: LinearTile(64, 32, 128, 4, 4),
        64: LinearTile(64, 64, 128, 4, 3),
    },
    (4864, 896): {
        8: LinearTile(16, 8, _ONE_STEP, 2, 1, ahead=_ONE_STEP),
        16: LinearTile(32, 16, 128, 2, 4),
        32: LinearTile(16, 32, 128, 2, 4, ahead=256),
    },
    (1536, 576): {
        8: LinearTile(16, 8, _ONE_STEP, 2, 1, ahead=_ONE_STEP),
        16: LinearTile(16, 16, _ONE_STEP, 2, 1, ahead=_ONE_STEP),
        32: LinearTile(16, 32, _ONE_STEP, 4, 1, ahead=_ONE_STEP),
    },
}
"""The same for gate-up products with SwiGLU; out features are those of one half."""


QKV_FUSED_TOKENS = 8
"""Up to this many tokens, rotating and storing in the projection itself is faster than a kernel of its own."""

MEASURED_QKV: dict[tuple[int, int], LinearTile] = {
    # Qwen2.5-7B, Llama-3.1-8B.
    (2304, 3584): LinearTile(16, 8, 128, 1, 6),
    (3072, 4096): LinearTile(32, 8, 128, 2, 6),
}
"""(pairs of out features, in features) → tile of the fused projection, whose rows are pairs."""


def triton_tokens(out_features: int, in_features: int) -> int:
    """Up to how many tokens the sequential kernel is the faster one: what was measured beyond 32, or 32."""
    return max(TRITON_TOKENS, *MEASURED.get((out_features, in_features), {0: None}))


def swiglu_triton_tokens(out_features: int, in_features: int) -> int:
    """The same for a gate-up product with SwiGLU."""
    return max(TRITON_TOKENS, *MEASURED_SWIGLU.get((out_features, in_features), {0: None}))


def linear_tile(out_features: int, in_features: int, num_tokens: int) -> LinearTile:
    """The tile of a plain product."""
    measured = _smallest_that_holds(MEASURED.get((out_features, in_features), {}), num_tokens)
    if measured is not None:
        return measured
    if num_tokens > 64:
        return LinearTile(128, 128, 64, 8, 3)
    if num_tokens > 32:
        return LinearTile(64, 64, 64, 4, 10)
    if num_tokens > 16:
        return LinearTile(64, 32, min(128, _divisor(in_features)), 4, 6)
    if out_features >= 2048:
        return LinearTile(64, 16, min(128, _divisor(in_features)), 4, 8)
    tokens = 8 if num_tokens <= 8 else 16
    if in_features <= _ONE_STEP:
        return LinearTile(16, tokens, _ONE_STEP, 2, 1, ahead=_ONE_STEP)
    return LinearTile(16, tokens, 512, 4, 6)


def swiglu_tile(out_features: int, in_features: int, num_tokens: int) -> LinearTile:
    """The tile of a gate-up product with SwiGLU."""
    measured = _smallest_that_holds(MEASURED_SWIGLU.get((out_features, in_features), {}), num_tokens)
    if measured is not None:
        return measured
    if num_tokens > 64:
        return LinearTile(64, 128, 64, 8, 3)
    if num_tokens > 32:
        return LinearTile(64, 64, 64, 4, 6)
    return LinearTile(32, 16 if num_tokens <= 16 else 32, min(128, _divisor(in_features)), 2, 4)


def qkv_tile(num_pairs: int, in_features: int) -> LinearTile:
    """The tile of a fused projection of up to QKV_FUSED_TOKENS tokens; its rows are pairs of out features."""
    if (measured := MEASURED_QKV.get((num_pairs, in_features))) is not None:
        return measured
    if in_features <= _ONE_STEP:
        return LinearTile(16, 8, _ONE_STEP, 2, 1, ahead=_ONE_STEP)
    return LinearTile(16, 8, min(128, _divisor(in_features)), 1, 6)


def _smallest_that_holds(by_tokens: dict[int, LinearTile], num_tokens: int) -> LinearTile | None:
    return next((by_tokens[most] for most in sorted(by_tokens) if num_tokens <= most), None)


def _divisor(in_features: int) -> int:
    """The largest power of two that divides the in features, at least 64: such steps need no mask."""
    return max(64, in_features & -in_features)
