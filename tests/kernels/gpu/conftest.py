"""The kernels' tests without a GPU: `interpreted/` runs in a process of its own, because Triton decides at import."""

import os

from triton_interpreter import let_scalars_be_loop_bounds

collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreted"]


let_scalars_be_loop_bounds()
