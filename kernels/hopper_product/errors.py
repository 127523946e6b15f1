"""Why there is no product with SwiGLU."""


class ProductUnavailable(RuntimeError):
    """It cannot be had here, and why."""
