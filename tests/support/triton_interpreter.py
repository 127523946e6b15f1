"""Triton 3.6's interpreter with NumPy 2.4, which no longer takes an array of one element for a number."""

import os
from typing import Any


def let_scalars_be_loop_bounds() -> None:
    """Kernel arguments are arrays of shape (1,) in the interpreter; `range` asks them for an integer."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch_lang_tensor
