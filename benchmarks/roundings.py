"""What each rounding of a GPU's 16-bit step costs, simulated in float32 on the CPU: SmolLM2 beside its exact forward.

    python benchmarks/roundings.py [--dtype bfloat16] [--windows 12]

The forward is that of `models/cuda`: what its kernels hand on is rounded to 16 bits, sums within a product are not. Each
row of the table leaves some of these roundings away. The text is this project's licence, as in `test_gpu_accuracy.py`, then
CPython's documentation, in windows of 512 tokens; a row says how often its best token is that of the exact forward, and
how far its logprobs are from it.

T tokens    D hidden    N query heads    K KV heads    H head dim    V vocabulary
"""

import argparse
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from accuracy import CPU, WINDOW_TOKENS, text

from triode.models.config import ModelOptions
from triode.models.loader import open_checkpoint
from triode.models.rope import rope_table
from triode.models.weights import LayerWeights

MODEL = "smollm2-135m"
LICENSE = Path(__file__).parents[1] / "LICENSE"
LICENSE_WINDOWS = 4
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
INPUTS = frozenset({"norm", "last norm", "q", "k", "v", "weights", "attended", "gated"})
"""Of products, which tensor cores want in 16 bits."""
ALL = INPUTS | {"residual", "addend", "normal", "qkv", "gate_up"}
ROWS = {
    "all roundings": ALL,
    "and logits, as in transformers; the first of equals is the best": ALL | {"logits"},
    "a residual stream in float32": ALL - {"residual"},
    "the same, and what is added to it": ALL - {"residual", "addend"},
    "norms in float32 until their weight is applied": ALL - {"normal"},
    "norms' results in float32": ALL - {"normal", "norm", "last norm"},
    "queries, keys and values in float32 until they are rotated": ALL - {"qkv"},
    "keys and values in float32 in the cache": ALL - {"k", "v"},
    "attention's weights in float32": ALL - {"weights"},
    "gate and up in float32": ALL - {"gate_up"},
    "gate, up and their product in float32": ALL - {"gate_up", "gated"},
    "the head's input in float32": ALL - {"last norm"},
    "only inputs of products are rounded": INPUTS,
    "only inputs of products, but those of norms": INPUTS - {"norm", "last norm"},
    "nothing but the residual stream": frozenset({"residual"}),
}
"""What is still rounded, by what the row says."""


@dataclass(frozen=True)
class Judged:
    """Of some windows: the logprob of each next token, and the best one instead of it."""

    logprobs: torch.Tensor
    best: torch.Tensor


class Simulated:
    """The model in float32, of weights that are those of `dtype`."""

    def __init__(self, dtype: torch.dtype) -> None:
        checkpoint = open_checkpoint(ModelOptions(model=MODEL, max_context_tokens=1024))
        weights = checkpoint.load_weights(dtype, CPU)
        self._dtype, self._config, self._encode = dtype, checkpoint.config, checkpoint.tokenizer.encode
        self._layers = weights.layers
        self._embed_VD, self._final_norm_D = weights.embed_VD.float(), weights.final_norm_D.float()
        self._rope = rope_table(checkpoint.config, CPU)
        self._rounded: frozenset[str] = frozenset()

    def windows(self, num_windows: int) -> list[list[int]]:
        """The licence's, then others."""
        others = num_windows - LICENSE_WINDOWS
        texts = ((LICENSE.read_text(), LICENSE_WINDOWS), (text()[: others * WINDOW_TOKENS * 8], others))
        tokens = [(self._encode(content), count) for content, count in texts]
        return [list(ids[index * WINDOW_TOKENS :][:WINDOW_TOKENS]) for ids, count in tokens for index in range(count)]

    @torch.inference_mode()
    def judge(self, windows: Iterable[list[int]], rounded: frozenset[str]) -> Judged:
        """With what is named in `rounded` rounded."""
        self._rounded = rounded
        logprobs, best = [], []
        for window in windows:
            logprobs_TV = self._logits(torch.tensor(window))[:-1].log_softmax(-1)
            logprobs.append(logprobs_TV.gather(1, torch.tensor(window[1:])[:, None])[:, 0])
            best.append(logprobs_TV.argmax(-1))
        return Judged(torch.cat(logprobs), torch.cat(best))

    def _round(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return x.to(self._dtype).float() if name in self._rounded else x

    def _norm(self, x_TD: torch.Tensor, weight_D: torch.Tensor, name: str = "norm") -> torch.Tensor:
        inverse_T1 = x_TD.square().mean(-1, keepdim=True).add(self._config.rms_norm_eps).rsqrt()
        return self._round(name, self._round("normal", x_TD * inverse_T1) * weight_D.float())

    def _logits(self, token_T: torch.Tensor) -> torch.Tensor:
        x_TD = self._embed_VD[token_T]
        for layer in self._layers:
            added_TD = self._attended(self._norm(x_TD, layer.input_norm_D), layer) @ layer.o_DE.float().T
            x_TD = self._round("residual", x_TD + self._round("addend", added_TD))
            gate_up_TF = self._norm(x_TD, layer.post_norm_D) @ layer.gate_up_FD.float().T
            gate_TF, up_TF = self._round("gate_up", gate_up_TF).chunk(2, -1)
            gated_TF = self._round("gated", torch.nn.functional.silu(gate_TF) * up_TF)
            x_TD = self._round("residual", x_TD + self._round("addend", gated_TF @ layer.down_DF.float().T))
        return self._round("logits", self._norm(x_TD, self._final_norm_D, "last norm") @ self._embed_VD.T)

    def _attended(self, x_TD: torch.Tensor, layer: LayerWeights) -> torch.Tensor:
        N, K, H = self._config.num_heads, self._config.num_kv_heads, self._config.head_dim
        qkv_TJH = self._round("qkv", x_TD @ layer.qkv_ED.float().T).unflatten(-1, (N + 2 * K, H))
        q_TNH, k_TKH, v_TKH = qkv_TJH.split((N, K, K), 1)
        q_NTH = self._round("q", self._turned(q_TNH)).transpose(0, 1)
        k_KTH, v_KTH = self._round("k", self._turned(k_TKH)).transpose(0, 1), self._round("v", v_TKH).transpose(0, 1)
        k_NTH, v_NTH = (tensor.repeat_interleave(N // K, 0) for tensor in (k_KTH, v_KTH))
        future_TT = torch.full((len(x_TD), len(x_TD)), -torch.inf).triu(1)
        score_NTT = q_NTH @ k_NTH.transpose(1, 2) * H**-0.5 + future_TT
        weight_NTT = self._round("weights", (score_NTT - score_NTT.amax(-1, keepdim=True)).exp())
        out_NTH = weight_NTT @ v_NTH / weight_NTT.sum(-1, keepdim=True)
        return self._round("attended", out_NTH.transpose(0, 1).flatten(1))

    def _turned(self, x_TJH: torch.Tensor) -> torch.Tensor:
        cos_T1U, sin_T1U = (table_XU[: len(x_TJH), None] for table_XU in (self._rope.cos_XU, self._rope.sin_XU))
        first_TJU, second_TJU = x_TJH.chunk(2, -1)
        return torch.cat(
            [first_TJU * cos_T1U - second_TJU * sin_T1U, second_TJU * cos_T1U + first_TJU * sin_T1U], dim=-1
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--windows", type=int, default=12, help="the licence's four and others")
    arguments = parser.parse_args()
    if arguments.windows < LICENSE_WINDOWS:
        parser.error(f"--windows must be an integer >= {LICENSE_WINDOWS}, got {arguments.windows}")
    model = Simulated(DTYPES[arguments.dtype])
    windows = model.windows(arguments.windows)
    exact = model.judge(windows, frozenset())
    print(f"| {MODEL}, {arguments.dtype} | best token equal, of {len(exact.best)} | relative error |\n|---|---|---|")
    for name, rounded in ROWS.items():
        found = model.judge(windows, rounded)
        error = float((found.logprobs - exact.logprobs).norm() / exact.logprobs.norm())
        num_equal = int((found.best == exact.best).sum())
        print(f"| {name} | {num_equal} ({num_equal / len(exact.best):.2%}) | {error:.2%} |", flush=True)


if __name__ == "__main__":
    main()
