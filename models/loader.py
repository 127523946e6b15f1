"""Opens a model: its config and tokenizer at once, its weights when asked."""

from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import torch

from triode.models.config import DeviceChoice, DtypeChoice, ModelConfig, ModelOptions
from triode.models.parallel import RankOrder
from triode.models.progress import NullProgress, Progress
from triode.models.quantization import NOT_QUANTIZED, WeightPlan
from triode.models.source import RANDOM_PREFIX, locate
from triode.models.tensors import TensorReader, load_weights
from triode.models.tokenizer import Tokenizer
from triode.models.weights import DecoderWeights


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """An opened model whose weights are still on disk."""

    config: ModelConfig
    tokenizer: Tokenizer
    tensors: TensorReader
    files: tuple[Path, ...] = ()
    """Those that hold the weights."""

    def load_weights(
        self,
        dtype: torch.dtype,
        device: torch.device,
        progress: Progress | None = None,
        plan: WeightPlan = NOT_QUANTIZED,
        ranks: RankOrder | None = None,
    ) -> DecoderWeights:
        """Reads the weights into newly allocated tensors, but for matrices that `plan` keeps as the file has them.

        Args:
            dtype: of the tensors.
            device: where they are to be.
            progress: told how far it has come.
            plan: which matrices stay as they are.
            ranks: those that read their shares at the same time, if this is one's share.

        Raises:
            ModelError: the files are corrupt, or of a kind that is not supported.
            InsufficientMemory: the weights do not fit.
            ValueError: `plan` does not suit the model.
        """
        return load_weights(self.config, self.tensors, dtype, device, progress or NullProgress(), plan, ranks)


def open_checkpoint(options: ModelOptions, progress: Progress | None = None) -> Checkpoint:
    """Finds the model, downloading it if need be, and reads its config and tokenizer.

    Raises:
        ModelError: there is no such model, its files are corrupt, or it is not supported.
        MissingExtra: only transformers can read its tokenizer, and it is not installed.
        ValueError: `max_context_tokens` is more than the model is made for.
    """
    progress = progress or NullProgress()
    if options.model.startswith(RANDOM_PREFIX):
        return _with_context(_open_random(options, progress), options)
    path = locate(options.model, progress)
    return _with_context(_open_folder(path) if path.is_dir() else _open_gguf(path), options)


def resolve_device(choice: DeviceChoice) -> torch.device:
    """The device to run on.

    Raises:
        ValueError: there is no GPU, and one is asked for.
    """
    if choice == "cuda" and not torch.cuda.is_available():
        raise ValueError("device must be cpu or auto, because torch finds no GPU here, got 'cuda'")
    if choice == "auto":
        choice = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(choice)


def resolve_dtype(
    choice: DtypeChoice, config: ModelConfig, device: torch.device, cpuinfo: Path = Path("/proc/cpuinfo")
) -> torch.dtype:
    """The dtype to compute in: auto takes bfloat16 where the device multiplies it, else what it does best."""
    if choice != "auto":
        return _DTYPES[choice]
    if device.type == "cuda":
        return torch.float16 if config.dtype == "float16" else torch.bfloat16
    return torch.bfloat16 if _multiplies_bfloat16(cpuinfo) else torch.float32


_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def _multiplies_bfloat16(cpuinfo: Path) -> bool:
    if not cpuinfo.exists():
        return False
    lines = cpuinfo.read_text().splitlines()
    # x86 and ARM have words of their own for the list, too.
    flags = next((line.split() for line in lines if line.startswith(("flags", "Features"))), [])
    return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(flags)


def _with_context(checkpoint: Checkpoint, options: ModelOptions) -> Checkpoint:
    if options.max_context_tokens is None:
        return checkpoint
    config = msgspec.structs.replace(checkpoint.config, max_context_tokens=options.max_context_tokens)
    return replace(checkpoint, config=config)


def _open_gguf(path: Path) -> Checkpoint:
    # Imported here, as in the functions below: each format brings packages that the others do not need.
    from triode.models.gguf import GGUFFile
    from triode.models.gguf_config import read_config
    from triode.models.gguf_tensors import GGUFTensors
    from triode.models.gguf_tokenizer import read_tokenizer

    file = GGUFFile(path)
    config = read_config(file)
    return Checkpoint(config, read_tokenizer(file), GGUFTensors(file, config), (path,))


def _open_folder(path: Path) -> Checkpoint:
    from triode.models.hf_config import read_config
    from triode.models.hf_tokenizer import read_tokenizer
    from triode.models.safetensors import SafetensorsFolder

    config = read_config(path)
    return Checkpoint(config, read_tokenizer(path), SafetensorsFolder(path), tuple(sorted(path.glob("*.safetensors"))))


def _open_random(options: ModelOptions, progress: Progress) -> Checkpoint:
    from triode.models.gguf import GGUFFile
    from triode.models.gguf_tokenizer import read_tokenizer
    from triode.models.random_model import RandomTensors, random_config
    from triode.models.source import ALIASES

    config = random_config(options.model.removeprefix(RANDOM_PREFIX))
    tokenizer = read_tokenizer(GGUFFile(locate(ALIASES[0], progress)))
    return Checkpoint(config, tokenizer, RandomTensors(config, options.weights_seed))
