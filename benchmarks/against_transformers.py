"""Triode beside transformers' `generate` on one CPU: same weights, dtype and threads, taking turns.

    python benchmarks/against_transformers.py [--dtypes bfloat16 float32] [--rounds 3] [--only prefill]

Both have the weights of the SmolLM2 GGUF. Each test is a batch of random prompts and a number of new tokens, timed from
handing the prompts over to having the last token; the two take turns (A B A B), so that whatever else the machine does
meets both, and only ratios are to be quoted: the median of the rounds, beside the lowest and the highest. transformers
gets its prompts as one batch without padding, and no streaming, which is its fastest way.

transformers computes in a process of its own: OpenMP's threads sleep after every operation once a process has more of them
than cores, and each side would bring its own.
"""

import argparse
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from functools import cache
from multiprocessing import get_context
from statistics import median
from time import perf_counter
from typing import NamedTuple

import torch
import trio
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

import triode
from triode.engine.cli.bench.workload import Request, equal_requests
from triode.engine.engine import Engine
from triode.models.config import ModelConfig, ModelOptions
from triode.models.loader import open_checkpoint
from triode.models.weights import DecoderWeights

MODEL = "smollm2-135m"


class Test(NamedTuple):
    """A figure: `value` makes it of the seconds that the test took."""

    name: str
    requests: tuple[Request, ...]
    unit: str
    value: Callable[[float], float]


def tests() -> list[Test]:
    """What is compared. Time per token is a long run less a short one, on both sides."""
    return [
        Test("time to first token, prompt 128", equal_requests(1, 128, 1), "ms", lambda s: s * 1e3),
        Test("batch 1, prompt 128, 64 new", equal_requests(1, 128, 64), "tok/s", lambda s: 64 / s),
        Test("16 at once, prompt 128, 128 new", equal_requests(16, 128, 128), "tok/s", lambda s: 16 * 128 / s),
        Test("prefill 1024", equal_requests(1, 1024, 1), "tok/s", lambda s: 1024 / s),
    ]


def build_transformers(dtype: torch.dtype) -> LlamaForCausalLM:
    """transformers' own Llama around the tensors that Triode loads."""
    checkpoint = open_checkpoint(ModelOptions(model=MODEL))
    config, weights = checkpoint.config, checkpoint.load_weights(dtype, torch.device("cpu"))
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            rms_norm_eps=config.rms_norm_eps,
            max_position_embeddings=config.max_context_tokens,
            tie_word_embeddings=config.tie_word_embeddings,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope.theta},
        )
    )
    model = model.to(dtype).eval()
    model.load_state_dict(_hf_tensors(config, weights))
    # No token ends a reply: both sides make exactly as many as they are asked for.
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def _hf_tensors(config: ModelConfig, weights: DecoderWeights) -> dict[str, torch.Tensor]:
    tensors = {
        "model.embed_tokens.weight": weights.embed_VD,
        "model.norm.weight": weights.final_norm_D,
        "lm_head.weight": weights.head_VD,
    }
    q_rows, kv_rows = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    for index, layer in enumerate(weights.layers):
        q, k, v = layer.qkv_ED.split((q_rows, kv_rows, kv_rows))
        gate, up = layer.gate_up_FD.chunk(2)
        own = {
            "self_attn.q_proj": q,
            "self_attn.k_proj": k,
            "self_attn.v_proj": v,
            "self_attn.o_proj": layer.o_DE,
            "mlp.gate_proj": gate,
            "mlp.up_proj": up,
            "mlp.down_proj": layer.down_DF,
            "input_layernorm": layer.input_norm_D,
            "post_attention_layernorm": layer.post_norm_D,
        }
        tensors |= {f"model.layers.{index}.{name}.weight": tensor for name, tensor in own.items()}
    return tensors


class Transformers:
    """`generate`, greedy, in a process of its own."""

    def __init__(self, dtype: str) -> None:
        self._process = ProcessPoolExecutor(1, get_context("spawn"))
        self._dtype = dtype

    def run(self, requests: tuple[Request, ...]) -> tuple[float, list[tuple[int, ...]]]:
        """How many seconds it took, and the new tokens of each request."""
        return self._process.submit(_generate, self._dtype, requests).result()

    def close(self) -> None:
        """End the process."""
        self._process.shutdown()


@cache
def _model(dtype: str) -> LlamaForCausalLM:
    return build_transformers(getattr(torch, dtype))


def _generate(dtype: str, requests: tuple[Request, ...]) -> tuple[float, list[tuple[int, ...]]]:
    model, prompts = _model(dtype), torch.tensor([request.prompt for request in requests])
    started_at_s = perf_counter()
    with torch.inference_mode():
        output = model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=requests[0].new_tokens,
            do_sample=False,
        )
    tokens = [tuple(row[prompts.shape[1] :]) for row in output.tolist()]
    return perf_counter() - started_at_s, tokens


async def run_triode(engine: Engine, requests: tuple[Request, ...]) -> list[tuple[int, ...]]:
    """The same from Triode. The prefix cache is cleared first: every prompt is computed."""
    await engine.cache.clear()
    params = [
        triode.SamplingParams(max_tokens=request.new_tokens, temperature=0, ignore_eos=True) for request in requests
    ]
    results = await engine.generate([request.prompt for request in requests], params)
    return [result.completion.token_ids for result in results]


async def compare(dtype: str, rounds: int, chosen: list[Test], reference: Transformers, table: Table) -> None:
    """A row for each test."""
    async with triode.open_engine(MODEL, dtype=dtype) as engine:
        for test in chosen:
            our_times_s, their_times_s = [], []
            # The first round warms both up.
            for _ in range(rounds + 1):
                started_at_s = perf_counter()
                ours_tokens = await run_triode(engine, test.requests)
                our_times_s.append(perf_counter() - started_at_s)
                their_time_s, their_tokens = reference.run(test.requests)
                their_times_s.append(their_time_s)
            ratios = [theirs / ours for ours, theirs in zip(our_times_s[1:], their_times_s[1:], strict=True)]
            num_equal = sum(ours == other for ours, other in zip(ours_tokens, their_tokens, strict=True))
            table.add_row(
                dtype,
                test.name,
                f"{test.value(median(our_times_s[1:])):.1f} {test.unit}",
                f"{test.value(median(their_times_s[1:])):.1f} {test.unit}",
                f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
                f"{num_equal} of {len(test.requests)}",
                engine.report.kernels,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="only the tests whose name contains this")
    arguments = parser.parse_args()
    chosen = [test for test in tests() if arguments.only in test.name]
    threads = torch.get_num_threads()
    table = Table(title=f"{MODEL}, {threads} threads, medians of {arguments.rounds} rounds taking turns")
    for column in ("dtype", "test", "triode", "transformers", "times as fast", "equal outputs", "kernels"):
        table.add_column(column)
    for dtype in arguments.dtypes:
        with closing(Transformers(dtype)) as reference:
            trio.run(compare, dtype, arguments.rounds, chosen, reference, table)
    console = Console()
    console.width = max(console.width, 160)
    console.print(table)


if __name__ == "__main__":
    main()
