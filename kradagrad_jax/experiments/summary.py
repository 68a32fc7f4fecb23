"""From finished runs to the rows of a table, and the table as text."""

import math
import statistics
from typing import Any, NamedTuple

from kradagrad_jax.experiments.compare import Findings
from kradagrad_jax.experiments.config import Comparison
from kradagrad_jax.experiments.plan import Series
from kradagrad_jax.experiments.records import Record


class Row(NamedTuple):
    """One line of the table: a series at its best learning rate.

    Attributes:
      series: which.
      learning_rate: with the lowest mean loss over seeds; None if nothing finished.
      records: its runs.
      loss: mean over seeds, infinite if any of them diverged.
      spread: standard deviation over seeds, 0 for a single one.
      extras: means of the task's other metrics at the point whose loss counts.
      steps: mean number of updates to the target, None if a seed never got there.
      seconds: the same in training time.
      update_ms: of the optimizer alone, None if not measured.
      state_bytes: likewise.
      edge: ``"smallest"`` or ``"largest"`` where the best learning rate ends its grid, else "".
    """

    series: Series
    learning_rate: float | None
    records: list[Record]
    loss: float
    spread: float
    extras: dict[str, float]
    steps: float | None
    seconds: float | None
    update_ms: float | None
    state_bytes: int | None
    edge: str


def _edge(series: Series, rate: float) -> str:
    grid = series.learning_rates
    if len(grid) < 2:
        return ""
    return {min(grid): "smallest", max(grid): "largest"}.get(rate, "")


def by_rate(series: Series, found: list[Record]) -> dict[float, list[Record]]:
    """The finished runs of every learning rate that has any."""
    runs = {rate: [r for r in found if r.learning_rate == rate] for rate in series.learning_rates}
    return {rate: some for rate, some in runs.items() if some}


def best_rate(
    series: Series, found: list[Record], select: str
) -> tuple[float, list[Record]] | None:
    """The learning rate with the lowest mean loss over its seeds, and its runs."""
    ended = by_rate(series, found)
    if not ended:
        return None
    return min(ended.items(), key=lambda item: statistics.fmean(r.loss(select) for r in item[1]))


def row_of(
    series: Series,
    best: tuple[float, list[Record]] | None,
    findings: Findings,
    select: str,
    target: float,
) -> Row:
    """The line of a series at one learning rate, given with its runs; None: nothing finished."""
    cost = findings.costs.get(series.key)
    ms, size = (cost.update_ms, cost.state_bytes) if cost else (None, None)
    if best is None:
        return Row(series, None, [], math.inf, 0.0, {}, None, None, ms, size, "")
    rate, runs = best
    losses = [run.loss(select) for run in runs]
    points = [run.chosen(select) for run in runs]
    at_target = [p for p in (run.reached(target) for run in runs) if p is not None]
    all_there = len(at_target) == len(runs)
    return Row(
        series,
        rate,
        runs,
        statistics.fmean(losses),
        statistics.stdev(losses) if len(losses) > 1 and math.isfinite(sum(losses)) else 0.0,
        {
            name: statistics.fmean(p.metrics[name] for p in points if p is not None)
            for name in runs[0].curve[0].metrics
            if name != "loss" and any(points)
        },
        statistics.fmean(p.step for p in at_target) if all_there else None,
        statistics.fmean(p.seconds for p in at_target) if all_there else None,
        ms,
        size,
        _edge(series, rate),
    )


class Table(NamedTuple):
    """The rows of one variant of the task and the loss that steps and seconds are counted to."""

    variant: str
    target: float
    rows: list[Row]


def tabulate(c: Comparison, series: list[Series], findings: Findings) -> list[Table]:
    """A table per variant.

    Without a target of its own the comparison takes what all seeds of the baseline (the first
    optimizer) reach at its best learning rate: the worst of their losses.
    """
    tables = []
    for variant in dict.fromkeys(s.variant for s in series):
        members = [s for s in series if s.variant == variant]
        target = c.target
        if target is None:
            baseline = best_rate(members[0], findings.records[members[0].key], c.select)
            target = max(r.loss(c.select) for r in baseline[1]) if baseline else -math.inf
        best = {s.key: best_rate(s, findings.records[s.key], c.select) for s in members}
        rows = [row_of(s, best[s.key], findings, c.select, target) for s in members]
        tables.append(Table(variant, target, rows))
    return tables


def _bytes(size: int | None) -> str:
    if size is None:
        return "-"
    return f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{size / 1e3:.1f} kB"


def _cells(row: Row, extras: list[str]) -> list[str]:
    if row.learning_rate is None:
        return [row.series.label, "-", "not run", *["-"] * (len(extras) + 4)]
    loss = f"{row.loss:.4g}" if math.isfinite(row.loss) else "diverged"
    if row.spread:
        loss += f" ± {row.spread:.1g}"
    return [
        row.series.label,
        f"{row.learning_rate:g}",
        loss,
        *[f"{row.extras[name]:.4f}" if name in row.extras else "-" for name in extras],
        "never" if row.steps is None else f"{row.steps:.0f}",
        "never" if row.seconds is None else f"{row.seconds:.2f}",
        "-" if row.update_ms is None else f"{row.update_ms:.2f}",
        _bytes(row.state_bytes),
    ]


def aligned(lines: list[list[str]]) -> str:
    """Columns of text, the first to the left and the others to the right, a rule below the head."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    return "\n".join([text[0], "-" * (sum(widths) + 2 * (len(widths) - 1)), *text[1:]])


def render(table: Table, select: str) -> str:
    """The table as text, with its target and a hint where a grid ended too early."""
    extras = list(dict.fromkeys(name for row in table.rows for name in row.extras))
    head = ["optimizer", "lr", f"{select} loss", *extras]
    head += ["steps to target", "s to target", "ms/update", "state"]
    text = aligned([head, *[_cells(row, extras) for row in table.rows]])
    if math.isfinite(table.target):
        text += f"\ntarget: a loss of {table.target:.4g}"
    hints = [f"{row.series.label} (the {row.edge} tried)" for row in table.rows if row.edge]
    if hints:
        text += "\nbest learning rate at the end of its grid: " + "; ".join(hints)
    return text


def results(c: Comparison, tables: list[Table], findings: Findings) -> dict[str, Any]:
    """Everything for the results file."""
    return {
        "title": c.title,
        "task": c.task,
        "missing_runs": findings.missing,
        "tables": [
            {
                "variant": table.variant,
                "target": table.target,
                "rows": [_row_json(row) for row in table.rows],
            }
            for table in tables
        ],
        "runs": [
            {"series": key} | record.to_json()
            for key, records in findings.records.items()
            for record in records
        ],
    }


def _row_json(row: Row) -> dict[str, Any]:
    fields = row._asdict()
    del fields["records"]
    series = fields.pop("series")
    return {"series": series.key, "label": series.label, "settings": series.settings} | fields
