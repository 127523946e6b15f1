"""The tokenizer of a model, for a process that runs no model: nothing here imports torch."""

from triode.models.progress import Progress
from triode.models.source import ALIASES, RANDOM_PREFIX, locate
from triode.models.tokenizer import Tokenizer


def open_tokenizer(model: str, progress: Progress) -> Tokenizer:
    """Finds the model, downloading it if need be, and reads its tokenizer.

    Raises:
        ModelError: there is no such model, its files are corrupt, or its tokenizer is not supported.
        MissingExtra: only transformers can read the tokenizer, and it is not installed.
    """
    # A random model has the tokenizer of a real one.
    path = locate(ALIASES[0] if model.startswith(RANDOM_PREFIX) else model, progress)
    # Imported here: each format brings packages that the other does not need.
    if path.is_dir():
        from triode.models import hf_tokenizer

        return hf_tokenizer.read_tokenizer(path)
    from triode.models import gguf, gguf_tokenizer

    return gguf_tokenizer.read_tokenizer(gguf.GGUFFile(path))
