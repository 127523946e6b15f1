"""The rows of `triode bench serve` as a picture: what load does to waits, and to what comes out."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from triode.engine.cli.bench.serving.figures import ServingRow

_PERCENTILES = ("p50", "p90", "p99")


def plot(path: Path, rows: Sequence[ServingRow]) -> None:
    """Write a PNG with a panel each for the times and for the tokens."""
    # Without pyplot: it would look for a screen.
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots(2, 2).flatten()
    is_open = rows[0].rate is not None
    loads = [float(row.rate if row.rate is not None else row.concurrency or 0) for row in rows]
    for axis, name, title in zip(axes, ("ttft_ms", "tpot_ms", "e2e_ms"), ("TTFT", "TPOT", "End to end"), strict=False):
        for percentile in _PERCENTILES:
            points = [
                (load, getattr(spread, percentile))
                for load, row in zip(loads, rows, strict=True)
                if (spread := getattr(row, name)) is not None
            ]
            axis.plot(*zip(*points, strict=True), marker="o", label=percentile)
        axis.set_title(f"{title}, ms")
        axis.legend()
    axes[3].plot(loads, [row.out_tok_s for row in rows], marker="o")
    axes[3].set_title("Output tokens a second")
    for axis in axes:
        axis.set_xlabel("requests a second" if is_open else "requests at a time")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    figure.suptitle(rows[0].model)
    figure.savefig(path, dpi=100, format="png")
