"""The names by which the floors refer to one another's things.

A `RequestId` is the caller's; everything else is an index handed out by the floor that owns the thing.
"""

from array import array
from collections.abc import Iterable
from typing import NewType

RequestId = NewType("RequestId", str)
"""One call of `Engine.submit`; unique among the unfinished requests of an engine."""

SequenceId = NewType("SequenceId", int)
"""One of the `n` token sequences of a request; never reused within an engine."""

SlotId = NewType("SlotId", int)
"""A place in the runner's batch, `0 <= slot < max_running`; reused, hence always paired with an epoch."""

StepId = NewType("StepId", int)
"""A step of the model, counted from 0."""

BlockId = NewType("BlockId", int)
"""A block of the KV cache. Block 0 belongs to nobody: padding is written there."""

TokenId = NewType("TokenId", int)
"""An entry of the model's vocabulary."""

TOKEN_BYTES = array("I").itemsize
"""Of a packed token."""


def pack_tokens(token_ids: Iterable[int]) -> bytes:
    """Tokens as an array of 32-bit words."""
    # Python fills an array of unsigned integers three times as fast.
    return array("I", token_ids).tobytes()
