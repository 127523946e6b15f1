"""Triode through `Engine`: tokenizer, scheduler, cache, executor and detokenizer all take part.

    peer_triode.py MODEL FORMAT THREADS

FORMAT is bfloat16 or float32, or what `quantization` takes, with "-g" and `quantization_group` behind it if it is to be
another than the format's own; "+int8kv" at the end keeps keys and values as int8.
"""

import sys
from typing import Any

from peer_protocol import answer_requests

import triode


def settings_of(form: str) -> dict[str, Any]:
    """What the engine is told for it."""
    weights, _, cache = form.partition("+")
    name, _, group = weights.partition("-g")
    is_dtype = name in ("bfloat16", "float32")
    settings: dict[str, Any] = {"dtype": name} if is_dtype else {"dtype": "bfloat16", "quantization": name}
    groups = {"quantization_group": int(group)} if group else {}
    return settings | groups | ({"kv_dtype": "int8"} if cache == "int8kv" else {})


def main() -> None:
    model, form, num_threads = sys.argv[1], sys.argv[2], int(sys.argv[3])
    settings = settings_of(form) | {"num_threads": num_threads, "prefix_cache": False, "max_context_tokens": 2048}
    with triode.LLM(model, **settings) as llm:

        def generate(prompts: list[list[int]], new_tokens: int) -> object:
            return llm.generate(prompts, triode.SamplingParams(max_tokens=new_tokens, temperature=0, ignore_eos=True))

        answer_requests(generate)


if __name__ == "__main__":
    main()
