"""llama.cpp through its C interface, as its own server drives it: one batch a step, a sequence for each prompt.

    peer_llama_cpp.py GGUF FORMAT THREADS

FORMAT is that of the file.
"""

import sys

import llama_cpp
import numpy as np
from peer_protocol import answer_requests

MAX_SEQUENCES = 16
CONTEXT_TOKENS = 8192
BATCH_TOKENS = 2048


class LlamaCpp:
    """One context, whose cache is cleared before each request."""

    def __init__(self, path: str, num_threads: int) -> None:
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_seq_max = CONTEXT_TOKENS, BATCH_TOKENS, MAX_SEQUENCES
        params.kv_unified = True
        params.n_threads = params.n_threads_batch = num_threads
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._batch = llama_cpp.llama_batch_init(BATCH_TOKENS, 0, 1)

    def generate(self, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        """The new tokens of each prompt."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)
        outputs: list[list[int]] = [[] for _ in prompts]
        step = [(sequence, 0, prompt) for sequence, prompt in enumerate(prompts)]
        for _ in range(new_tokens):
            for (sequence, start, tokens), token in zip(step, self._decode(step), strict=True):
                outputs[sequence].append(token)
                step[sequence] = (sequence, start + len(tokens), [token])
        return outputs

    def _decode(self, rows: list[tuple[int, int, list[int]]]) -> list[int]:
        """The likeliest token after each row (sequence, first position, tokens)."""
        batch, at, last = self._batch, 0, []
        for sequence, start, tokens in rows:
            for offset, token in enumerate(tokens):
                batch.token[at], batch.pos[at] = token, start + offset
                batch.n_seq_id[at], batch.seq_id[at][0] = 1, sequence
                batch.logits[at] = offset == len(tokens) - 1
                at += 1
            last.append(at - 1)
        batch.n_tokens = at
        if llama_cpp.llama_decode(self._context, batch):
            raise RuntimeError(f"llama.cpp cannot decode {at} tokens")
        return [self._likeliest(index) for index in last]

    def _likeliest(self, index: int) -> int:
        logits = llama_cpp.llama_get_logits_ith(self._context, index)
        return int(np.ctypeslib.as_array(logits, (self._vocab_size,)).argmax())


def main() -> None:
    answer_requests(LlamaCpp(sys.argv[1], int(sys.argv[3])).generate)


if __name__ == "__main__":
    main()
