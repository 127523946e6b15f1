"""Times the kernels that cuBLASLt offers for products of many tokens: where `linear/algorithms.py` comes from.

    PYTHONPATH=src python benchmarks/gpu_algorithms.py [--models qwen llama] [--products down ...] [--tokens 128 256 ...]
        [--tiles 40] [--sustained 0.1]

All clusters and options of the tiles that should take the fewest cycles are timed, and the fastest of them again in CUDA
graphs, by turns with torch's choice and the table's. `--sustained` then has the GPU come to its power limit: each of them
runs for that long, by turns. `cublasLt.h` must lie beside the library, as in PyPI's packages.
"""

import argparse
import itertools
import re
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeAlias

import torch
from gpu_timing import DEVICE, LLAMA, QWEN, Shape, copies_of, products, random, unwritten

from triode.kernels.linear.algorithms import CLUSTER_IDS, TILE_IDS, Algorithm
from triode.kernels.linear.blas import blas_of, linear_torch, split_k_refused
from triode.kernels.linear.cublaslt import CublasLt, CublasLtError, loaded_library

MODELS = {"qwen": QWEN, "llama": LLAMA}
TOKENS = (48, 64, 80, 96, 112, 128, 160, 192, 224, 256, 384, 512, 640, 768, 896, 1024, 2048, 3072, 4096)
NUM_SMS = 132
MOST_TRIED, MOST_KEPT = 40, 8
QUEUED = 60

Product: TypeAlias = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]


def read_numbers(header: str) -> None:
    """Name every tile, and every cluster of up to 8, as the library's header does."""
    for kind, numbers in (("MATMUL_TILE", TILE_IDS), ("CLUSTER_SHAPE", CLUSTER_IDS)):
        for first, second, number in re.findall(rf"CUBLASLT_{kind}_(\d+)x(\d+)(?:x1)? = (\d+)", header):
            numbers[int(first), int(second)] = int(number)
    for cluster in [cluster for cluster in CLUSTER_IDS if cluster[0] * cluster[1] > 8]:
        del CLUSTER_IDS[cluster]


def cycles(out_features: int, num_tokens: int, tile: tuple[int, int]) -> float:
    """Those of 16 in features, of the multiprocessor with the most tiles: its products, or its shared memory's traffic."""
    features, tokens = tile
    num_tiles = -(-out_features // features) * -(-num_tokens // tokens)
    written = features + tokens
    read = min(-(-features // 64) * (64 + tokens), -(-tokens // 64) * (64 + features))
    return -(-num_tiles // NUM_SMS) * max(features * tokens / 128, (written + read) / 4)


def candidates(out_features: int, num_tokens: int, most_tiles: int) -> Iterator[Algorithm]:
    """Those of the tiles that should be done first."""
    tiles = [tile for tile in TILE_IDS if tile[0] >= 32 and 16 <= tile[1] < 2 * num_tokens + 64]
    tiles.sort(key=lambda tile: cycles(out_features, num_tokens, tile))
    for tile, cluster, option in itertools.product(tiles[:most_tiles], CLUSTER_IDS, range(8)):
        yield Algorithm(*tile, cluster, option)


def by_algorithm(lt: CublasLt, algorithm: Algorithm | None) -> Product:
    return lambda x, weight, out: lt.multiply(x, weight, out, algorithm=algorithm)


class Case:
    """A product, with weights enough that L2 does not hold them."""

    def __init__(self, size: tuple[int, int], num_tokens: int, out_dtype: torch.dtype) -> None:
        out_features, in_features = size
        self.weights = copies_of(out_features, in_features)
        self.x = random(num_tokens, in_features)
        self.out = unwritten(num_tokens, out_features, dtype=out_dtype)
        self._next = itertools.cycle(self.weights)

    def once(self, product: Product) -> None:
        product(self.x, next(self._next), self.out)

    def graph(self, product: Product) -> torch.cuda.CUDAGraph:
        """All weights once."""
        for weight in self.weights:
            product(self.x, weight, self.out)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for weight in self.weights:
                product(self.x, weight, self.out)
        return graph

    def gives_bits_of(self, product: Product, expected: torch.Tensor) -> bool:
        self.out.fill_(torch.nan)
        product(self.x, self.weights[0], self.out)
        return torch.equal(self.out, expected)


def event() -> torch.cuda.Event:
    made = torch.cuda.Event(enable_timing=True)
    made.record()
    return made


def quick_us(case: Case, tried: list[Product], repeats: int) -> list[float]:
    """The time of each, queued behind a pause: a launch takes the host longer than such a product the GPU."""
    times = []
    for first in range(0, len(tried), QUEUED):
        torch.cuda._sleep(9_000_000)
        marks = []
        for product in tried[first : first + QUEUED]:
            case.once(product)
            begin = event()
            for _ in range(repeats):
                case.once(product)
            marks.append((begin, event()))
        torch.cuda.synchronize()
        times += [begin.elapsed_time(end) * 1e3 / repeats for begin, end in marks]
    return times


def by_turns_us(
    graphs: dict[str, torch.cuda.CUDAGraph], num_weights: int, rounds: int, slice_s: float
) -> dict[str, float]:
    """Median time of a product. With a slice, each runs for so long, the GPU never resting."""
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for number in range(rounds):
        marks = []
        if not slice_s:
            torch.cuda._sleep(2_000_000)
        for name in list(graphs)[:: 1 if number % 2 else -1]:
            last = min(times[name], default=0.0) * num_weights
            replays = max(1, int(slice_s * 1e6 / last)) if last else 1
            begin = event()
            for _ in range(replays):
                graphs[name].replay()
            marks.append((name, begin, event(), replays))
        torch.cuda.synchronize()
        for name, begin, end, replays in marks:
            times[name].append(begin.elapsed_time(end) * 1e3 / replays / num_weights)
    return {name: statistics.median(found[2:]) for name, found in times.items()}


def measure(shape: Shape, name: str, num_tokens: int, lt: CublasLt, options: argparse.Namespace) -> None:
    size = products(shape)[name]
    case = Case(size, num_tokens, torch.float32 if name == "head" else torch.bfloat16)
    offered: list[Algorithm] = []
    for algorithm in candidates(size[0], num_tokens, options.tiles):
        try:
            case.once(by_algorithm(lt, algorithm))
        except CublasLtError:
            continue
        offered.append(algorithm)
    for repeats, most in ((1, MOST_TRIED), (3, MOST_KEPT)):
        times = quick_us(case, [by_algorithm(lt, algorithm) for algorithm in offered], repeats)
        ranked = sorted(zip(times, offered, strict=True), key=lambda pair: pair[0])
        offered = [algorithm for _, algorithm in ranked[:most]]
    with split_k_refused():
        linear_torch(case.x, case.weights[0], case.out)
        expected = case.out.clone()
        graphs = {"torch": case.graph(linear_torch)}
    graphs["table"] = case.graph(by_algorithm(lt, None))
    for algorithm in offered:
        product = by_algorithm(lt, algorithm)
        same = "" if case.gives_bits_of(product, expected) else " DIFFERS"
        label = f"{algorithm.features}x{algorithm.tokens} {algorithm.cluster} {algorithm.option}{same}"
        graphs[label] = case.graph(product)
    for slice_s in dict.fromkeys((0.0, options.sustained)):
        found = by_turns_us(graphs, len(case.weights), 6 if slice_s else 10, slice_s)
        row = "; ".join(f"{us:.1f} {label}" for label, us in sorted(found.items(), key=lambda pair: pair[1]))
        print(f"{shape.name} {name} M={num_tokens}{' sustained' if slice_s else ''}, µs: {row}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--products", nargs="+", default=["qkv", "o", "gate_up", "down"])
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS)
    parser.add_argument("--tiles", type=int, default=250, help="how many tiles are tried")
    parser.add_argument("--sustained", type=float, default=0.0, metavar="SECONDS", help="of each kernel and round")
    options = parser.parse_args()
    lt, path = blas_of(DEVICE), loaded_library()
    if not isinstance(lt, CublasLt) or path is None:
        raise SystemExit(f"cuBLASLt cannot be called: {lt}")
    read_numbers((Path(path).parent.parent / "include" / "cublasLt.h").read_text())
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, cuBLASLt {lt.version}")
    for model, num_tokens, name in itertools.product(options.models, options.tokens, options.products):
        measure(MODELS[model], name, num_tokens, lt, options)


if __name__ == "__main__":
    main()
