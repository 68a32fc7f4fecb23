"""The plot of a comparison: loss against updates and against seconds, a row per variant."""

from pathlib import Path
from typing import Any

import numpy as np

from kradagrad_jax.experiments.summary import Row, Table

_DASHES = {"float32": "-", "float64": "--"}


def _curves(row: Row) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Steps, mean seconds, and losses ``(seeds, points)`` as far as every seed went."""
    points = min(len(run.curve) for run in row.records)
    losses = [[p.metrics["loss"] for p in run.curve[:points]] for run in row.records]
    seconds = [[p.seconds for p in run.curve[:points]] for run in row.records]
    steps = [p.step for p in row.records[0].curve[:points]]
    return np.array(steps), np.mean(seconds, axis=0), np.array(losses)


def _draw(axes: Any, row: Row, color: str) -> None:
    steps, seconds, losses = _curves(row)
    style = {"color": color, "linestyle": _DASHES.get(row.series.dtype, ":")}
    for axis, x in zip(axes, (steps, seconds), strict=True):
        axis.plot(x, losses.mean(axis=0), label=row.series.label, **style)
        if len(losses) > 1:
            low, high = losses.min(axis=0), losses.max(axis=0)
            axis.fill_between(x, low, high, color=color, alpha=0.15, lw=0)


def _scale(axis: Any) -> None:
    """A logarithmic axis, with plain numbers where it spans less than two decades."""
    axis.set_yscale("log")
    low, high = axis.get_ylim()
    if high < 100 * low:
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("{x:g}")
        axis.grid(alpha=0.3, which="minor", axis="y")


def _legend(figure: Any, axis: Any) -> None:
    handles, labels = axis.get_legend_handles_labels()
    columns = min(len(labels), 4)
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize="small")


def draw(tables: list[Table], title: str, path: Path) -> bool:
    """Writes the plot as PNG: best learning rates, mean over seeds, a band from lowest to highest.

    Float64 is dashed, the target dotted. Where a run diverged, the curve ends. Nothing is
    written, and False returned, where no run has finished.
    """
    shown = [table for table in tables if any(row.records for row in table.rows)]
    if not shown:
        return False
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    count = len(shown)
    figure, grid = plt.subplots(
        count, 2, figsize=(10, 3.8 * count + 1), squeeze=False, sharey="row", layout="constrained"
    )
    names = list(dict.fromkeys(row.series.optimizer for t in shown for row in t.rows))
    colors = {name: f"C{i % 10}" for i, name in enumerate(names)}
    for table, axes in zip(shown, grid, strict=True):
        for row in table.rows:
            if row.records:
                _draw(axes, row, colors[row.series.optimizer])
        for axis, label in zip(axes, ("updates", "seconds of training"), strict=True):
            if np.isfinite(table.target):
                axis.axhline(table.target, color="gray", lw=0.8, ls=":")
            axis.set(xlabel=label)
            axis.grid(alpha=0.3)
        _scale(axes[0])
        _scale(axes[1])
        axes[0].set(ylabel="loss", title=table.variant)
    _legend(figure, grid[0][0])
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return True
