"""Why there is no product with SwiGLU."""


class ProductUnavailable(Exception):
    """It cannot be had here, and why."""
