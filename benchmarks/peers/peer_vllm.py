"""vLLM's CPU build on the weights of a folder, without a prefix cache.

    peer_vllm.py FOLDER FORMAT THREADS

FORMAT is bfloat16. torch.compile makes the first start take a minute or two.
"""

import os
import sys

from peer_protocol import answer_requests


class Vllm:
    """An engine in this process, on the first so many processors."""

    def __init__(self, path: str, form: str, num_threads: int) -> None:
        os.environ |= {
            "VLLM_CPU_KVCACHE_SPACE": "2",
            "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
            "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, sorted(os.sched_getaffinity(0))[:num_threads])),
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_NO_USAGE_STATS": "1",
        }
        # Imported here: it reads the environment.
        from vllm import LLM

        self._llm = LLM(
            path, dtype=form, skip_tokenizer_init=True, enable_prefix_caching=False, max_model_len=2048, max_num_seqs=16
        )

    def generate(self, prompts: list[list[int]], new_tokens: int) -> object:
        """The engine's results."""
        from vllm import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
        return self._llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)


def main() -> None:
    answer_requests(Vllm(sys.argv[1], sys.argv[2], int(sys.argv[3])).generate)


if __name__ == "__main__":
    main()
