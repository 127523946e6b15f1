"""OpenVINO GenAI, with its paged attention and continuous batching, on the weights of the GGUF file.

    peer_openvino_genai.py GGUF FORMAT THREADS

FORMAT is that of the file: OpenVINO keeps its blocks as they are.
"""

import sys

import numpy as np
import openvino as ov
import openvino_genai as genai
from peer_protocol import answer_requests


class OpenVino:
    """A pipeline without a prefix cache."""

    def __init__(self, path: str, num_threads: int) -> None:
        scheduler = genai.SchedulerConfig()
        scheduler.enable_prefix_caching = False
        scheduler.cache_size = 1
        self._pipeline = genai.LLMPipeline(
            path, "CPU", scheduler_config=scheduler, INFERENCE_NUM_THREADS=num_threads, PERFORMANCE_HINT="LATENCY"
        )

    def generate(self, prompts: list[list[int]], new_tokens: int) -> object:
        """The pipeline's results."""
        config = genai.GenerationConfig()
        config.max_new_tokens = new_tokens
        config.ignore_eos = True
        config.do_sample = False
        ids = np.array(prompts, dtype=np.int64)
        inputs = genai.TokenizedInputs(ov.Tensor(ids), ov.Tensor(np.ones_like(ids)))
        return self._pipeline.generate(inputs, config)


def main() -> None:
    answer_requests(OpenVino(sys.argv[1], int(sys.argv[3])).generate)


if __name__ == "__main__":
    main()
