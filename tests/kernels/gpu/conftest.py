"""The kernels' tests without a GPU: `interpreted/` runs in a process of its own, because Triton decides at import."""

import os

collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreted"]
