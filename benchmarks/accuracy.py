"""What rounding costs on real weights: each format of the compiled CPU step beside float32, on real text.

    python benchmarks/accuracy.py [--model smollm2-135m] [--windows 30] [--json]

The text is the documentation that CPython carries (`pydoc_data.topics`), some 2 kB a window: windows are of 512 tokens, and
each begins anew. Perplexity is of all but a window's first token; agreement is how often the likeliest token is that of
float32; KL is the mean divergence of a format's distribution from that of float32, in nats.
"""

import argparse
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pydoc_data.topics import topics

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from triode.cache.pool import KVPool
from triode.kernels.native.library import NativeLibrary, load_library
from triode.models.batch import build_batch
from triode.models.config import ModelOptions
from triode.models.loader import Checkpoint, open_checkpoint
from triode.models.native import NativeDecoder
from triode.models.quantization import Quantization, plan_weights

WINDOW_TOKENS = 512
BLOCK_SIZE_TOKENS = 16
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Variant:
    """A way to keep weights and cache."""

    quantization: Quantization = "none"
    group: int | None = None
    overrides: Mapping[str, str] = field(default_factory=dict)
    dtype: torch.dtype = torch.bfloat16
    kv_dtype: torch.dtype | None = None


FLOAT32 = Variant(dtype=torch.float32)
VARIANTS = {
    "bfloat16": Variant(),
    "bfloat16, int8 KV cache": Variant(kv_dtype=torch.int8),
    "a16w8": Variant("a16w8"),
    "a16w8 g64": Variant("a16w8", 64),
    "a8w8": Variant("a8w8"),
    "a8w8 g32": Variant("a8w8", 32),
    "a8w8 per channel": Variant("a8w8", 0),
    "a8w8, int8 KV cache": Variant("a8w8", kv_dtype=torch.int8),
    "a16w4 g32": Variant("a16w4", 32),
    "a16w4 g128": Variant("a16w4", 128),
    "a8w4 g32": Variant("a8w4", 32),
    "a8w4 g32, head a8w4": Variant("a8w4", 32, {"head": "a8w4"}),
    "a16gguf": Variant("a16gguf"),
    "a8gguf": Variant("a8gguf"),
}


@dataclass(frozen=True)
class Accuracy:
    """One variant beside float32."""

    variant: str
    weights_mb: float
    perplexity: float
    more_perplexity: float
    """As a fraction of float32's."""
    agreement: float
    kl: float


class Reader:
    """Logits of windows, by one variant."""

    def __init__(self, checkpoint: Checkpoint, library: NativeLibrary, variant: Variant) -> None:
        plan = plan_weights(variant.quantization, variant.group, variant.overrides)
        weights = checkpoint.load_weights(variant.dtype, CPU, plan=plan)
        self.decoder = NativeDecoder(checkpoint.config, weights, library, plan=plan)
        config = checkpoint.config
        self._pool = KVPool(
            WINDOW_TOKENS // BLOCK_SIZE_TOKENS + 1,
            block_size_tokens=BLOCK_SIZE_TOKENS,
            num_layers=config.num_layers,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            dtype=variant.kv_dtype or variant.dtype,
            device=CPU,
        )

    def log_probabilities(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Of each next token, [tokens, vocabulary]."""
        batch = build_batch(
            np.array(token_ids),
            np.array([0]),
            np.array([len(token_ids)]),
            np.arange(1, WINDOW_TOKENS // BLOCK_SIZE_TOKENS + 1)[None],
            block_size_tokens=BLOCK_SIZE_TOKENS,
            row_multiple=1,
            device=CPU,
        )
        hidden_TD = self.decoder.forward(batch, self._pool.keys, self._pool.values)
        return self.decoder.logits(hidden_TD).log_softmax(-1)


@dataclass
class Sums:
    """Over all tokens so far."""

    nats: float = 0.0
    agreed: int = 0
    kl: float = 0.0

    def add(self, token_ids: Sequence[int], found_TV: torch.Tensor, exact_TV: torch.Tensor) -> None:
        """Add a window, of log probabilities."""
        self.nats -= float(found_TV[:-1].gather(1, torch.tensor(token_ids[1:])[:, None]).sum())
        self.agreed += int((found_TV.argmax(1) == exact_TV.argmax(1)).sum())
        self.kl += float((exact_TV.exp() * (exact_TV - found_TV)).sum())


def text() -> str:
    """The same for every run of one Python."""
    return "\n".join(topics[name] for name in sorted(topics))


@torch.inference_mode()
def measure(
    checkpoint: Checkpoint,
    library: NativeLibrary,
    variants: Mapping[str, Variant],
    num_windows: int,
    announce: Callable[[str], None] = lambda _: None,
) -> list[Accuracy]:
    """Each variant beside float32, over so many windows."""
    token_ids = checkpoint.tokenizer.encode(text()[: num_windows * WINDOW_TOKENS * 8])
    windows = [token_ids[i * WINDOW_TOKENS : (i + 1) * WINDOW_TOKENS] for i in range(num_windows)]
    exact = Reader(checkpoint, library, FLOAT32)
    readers = {name: Reader(checkpoint, library, variant) for name, variant in variants.items()}
    sums = {name: Sums() for name in readers}
    exact_sums = Sums()
    for index, window in enumerate(windows):
        announce(f"window {index + 1} of {num_windows}")
        exact_TV = exact.log_probabilities(window)
        exact_sums.add(window, exact_TV, exact_TV)
        for name, reader in readers.items():
            sums[name].add(window, reader.log_probabilities(window), exact_TV)
    count = num_windows * WINDOW_TOKENS
    predicted = num_windows * (WINDOW_TOKENS - 1)
    return [
        Accuracy(
            name,
            readers[name].decoder.matrices_bytes / 1e6,
            math.exp(found.nats / predicted),
            math.exp((found.nats - exact_sums.nats) / predicted) - 1,
            found.agreed / count,
            found.kl / count,
        )
        for name, found in sums.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--windows", type=int, default=30)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    console = Console(stderr=True)
    checkpoint = open_checkpoint(ModelOptions(model=arguments.model))
    rows = measure(checkpoint, load_library(print), VARIANTS, arguments.windows, console.print)
    if arguments.json:
        print(json.dumps([asdict(row) for row in rows]))
        return
    table = Table(title=f"{arguments.model}, {arguments.windows} windows of {WINDOW_TOKENS} tokens")
    for column in ("", "matrices MB", "perplexity", "over float32", "same likeliest token", "KL"):
        table.add_column(column, justify="right" if column else "left")
    for row in rows:
        table.add_row(
            row.variant,
            f"{row.weights_mb:.0f}",
            f"{row.perplexity:.3f}",
            f"{row.more_perplexity:+.2%}",
            f"{row.agreement:.1%}",
            f"{row.kl:.4f}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
