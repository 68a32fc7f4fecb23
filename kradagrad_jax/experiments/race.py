"""Time to target: which optimizer gets to a loss first, in steps and in seconds."""

import csv
import dataclasses
import math
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

from kradagrad_jax.experiments.compare import Findings
from kradagrad_jax.experiments.config import Comparison
from kradagrad_jax.experiments.optimizers import absent
from kradagrad_jax.experiments.plan import Series
from kradagrad_jax.experiments.records import Record
from kradagrad_jax.experiments.store import Store, jsonable
from kradagrad_jax.experiments.summary import Row, aligned, by_rate, row_of

TABLE = "benchmark.csv"


class Trial(NamedTuple):
    """An optimizer at one learning rate and schedule length: a run per seed."""

    series: Series
    learning_rate: float
    records: list[Record]

    def loss(self, select: str) -> float:
        """Median over seeds of the loss that counts."""
        return statistics.median(record.loss(select) for record in self.records)

    def until(self, target: float, unit: Literal["step", "seconds"]) -> float:
        """Median over seeds of the steps or seconds to ``target``; never is infinite."""
        found = [record.reached(target) for record in self.records]
        return statistics.median(math.inf if p is None else getattr(p, unit) for p in found)


class Line(NamedTuple):
    """An optimizer in the race, at the settings that reach the target in the fewest steps.

    Attributes:
      row: those settings; of the lowest loss where none reaches the target.
      tried: number of settings: learning rates times schedule lengths.
      schedule_length: of those settings.
      longest: that is the longest of several.
      best_loss: the lowest of any settings, median over seeds.
      reached: number of seeds that got to the target.
      steps, seconds: to the target, medians over seeds; None: not reached.
      step_ms: milliseconds of a training step, median over seeds.
      compile_seconds: of the training steps, not part of ``seconds``; None: not measured.
      steps_ratio, seconds_ratio: to the first line's; None where one of the two is not reached.
    """

    row: Row
    tried: int
    schedule_length: int
    longest: bool
    best_loss: float
    reached: int
    steps: float | None
    seconds: float | None
    step_ms: float | None
    compile_seconds: float | None
    steps_ratio: float | None = None
    seconds_ratio: float | None = None


class Race(NamedTuple):
    """The lines of one variant of the task, the baseline first, and the loss they run to."""

    variant: str
    target: float
    lines: list[Line]


def available(c: Comparison) -> tuple[Comparison, list[str]]:
    """The comparison without the optimizers of packages that are absent, and why they are."""
    reasons = {key: absent(o.name or key) for key, o in c.optimizers.items()}
    present = {key: o for key, o in c.optimizers.items() if not reasons[key]}
    return dataclasses.replace(c, optimizers=present), [r for r in reasons.values() if r]


def _trials(members: list[Series], findings: Findings) -> Iterator[Trial]:
    for series in members:
        for rate, records in by_rate(series, findings.records[series.key]).items():
            yield Trial(series, rate, records)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _line(members: list[Series], c: Comparison, findings: Findings, target: float) -> Line:
    trials = list(_trials(members, findings))
    if not trials:
        row = row_of(members[0], None, findings, c.select, target)
        steps = members[0].settings["steps"]
        return Line(row, 0, steps, False, math.inf, 0, None, None, None, None)
    chosen = min(trials, key=lambda t: (t.until(target, "step"), t.loss(c.select)))
    length, lengths = chosen.series.settings["steps"], [s.settings["steps"] for s in members]
    cost = findings.costs.get(chosen.series.key)
    ends = [r.curve[-1] for r in chosen.records if r.curve[-1].step]
    return Line(
        row_of(
            chosen.series,
            (chosen.learning_rate, chosen.records),
            findings,
            c.select,
            target,
        ),
        len(trials),
        length,
        len(lengths) > 1 and length == max(lengths),
        min(trial.loss(c.select) for trial in trials),
        sum(record.reached(target) is not None for record in chosen.records),
        _finite(chosen.until(target, "step")),
        _finite(chosen.until(target, "seconds")),
        statistics.median(1e3 * p.seconds / p.step for p in ends) if ends else None,
        cost.compile_seconds if cost else None,
    )


def _ratio(a: float | None, b: float | None) -> float | None:
    return None if a is None or not b else a / b


def races(c: Comparison, series: list[Series], findings: Findings) -> list[Race]:
    """A race per variant of the task.

    Without a target of its own the comparison takes the baseline's best loss: the lowest median
    over seeds that any of its settings has.
    """
    out = []
    for variant in dict.fromkeys(s.variant for s in series):
        groups: dict[tuple[str, str], list[Series]] = {}
        for s in series:
            if s.variant == variant:
                groups.setdefault((s.optimizer, s.dtype), []).append(s)
        target, members = c.target, list(groups.values())
        if target is None:
            losses = [t.loss(c.select) for t in _trials(members[0], findings)]
            target = min(losses, default=-math.inf)
            target = target if math.isfinite(target) else -math.inf
        lines = [_line(group, c, findings, target) for group in members]
        first = lines[0]
        lines = [
            line._replace(
                steps_ratio=_ratio(line.steps, first.steps),
                seconds_ratio=_ratio(line.seconds, first.seconds),
            )
            for line in lines
        ]
        out.append(Race(variant, target, lines))
    return out


HEAD = ["optimizer", "lr", "schedule", "best loss", "seeds", "steps", "ratio", "seconds", "ratio"]
HEAD += ["ms/step", "compile s"]


def label(line: Line) -> str:
    """What to call the optimizer, without the schedule length that a row may bear."""
    return line.row.series.label.removesuffix(f", {line.schedule_length} steps")


def cells(line: Line) -> list[str]:
    """A line as text, below :data:`HEAD`."""
    if line.row.learning_rate is None:
        return [label(line), "-", "-", "not run", *["-"] * (len(HEAD) - 4)]
    return [
        label(line),
        f"{line.row.learning_rate:g}",
        f"{line.schedule_length}",
        f"{line.best_loss:.4g}" if math.isfinite(line.best_loss) else "diverged",
        f"{line.reached}/{len(line.row.records)}",
        "not reached" if line.steps is None else f"{line.steps:.0f}",
        "-" if line.steps_ratio is None else f"{line.steps_ratio:.0%}",
        "not reached" if line.seconds is None else f"{line.seconds:.3g}",
        "-" if line.seconds_ratio is None else f"{line.seconds_ratio:.0%}",
        "-" if line.step_ms is None else f"{line.step_ms:.2f}",
        "-" if line.compile_seconds is None else f"{line.compile_seconds:.1f}",
    ]


def _named(lines: list[Line], ratio: str) -> str:
    ahead = [(getattr(x, ratio), label(x)) for x in lines if (getattr(x, ratio) or 1) < 1]
    return ", ".join(f"{name} ({value:.0%})" for value, name in sorted(ahead)) or "none"


def verdict(race: Race) -> list[str]:
    """Who won, who lost, in sentences."""
    first, others = race.lines[0], race.lines[1:]
    out = []
    if first.steps is None:
        out.append(f"{label(first)} does not reach the target, so there are no ratios.")
    else:
        out.append(f"In fewer steps than {label(first)}: {_named(others, 'steps_ratio')}.")
        out.append(f"In fewer seconds than {label(first)}: {_named(others, 'seconds_ratio')}.")
    missed = [label(x) for x in race.lines if x.row.learning_rate is not None and x.steps is None]
    if missed:
        out.append(f"Target not reached by: {', '.join(missed)}.")
    ends = [f"{label(x)} (the {x.row.edge} lr tried)" for x in race.lines if x.row.edge]
    ends += [f"{label(x)} (the longest schedule tried)" for x in race.lines if x.longest]
    if ends:
        out.append(f"At the end of its grid, which may go on: {', '.join(ends)}.")
    return out


def explained(race: Race, seeds: tuple[int, ...]) -> str:
    """What the columns mean."""
    target = f"{race.target:.4g}" if math.isfinite(race.target) else "none (nothing has finished)"
    return (
        f"Target: a loss of {target}. Medians over {len(seeds)} seeds; seeds: how many got there. "
        "lr and schedule (its length in steps) are those that get there in the fewest steps, or, "
        "where none does, of the lowest loss; best loss is the lowest at any settings. Seconds are "
        "of training steps only: no compilation, no evaluation. Ratios are to "
        f"{label(race.lines[0])}."
    )


def render(race: Race, seeds: tuple[int, ...]) -> list[str]:
    """The race for a terminal: the table, and paragraphs below it."""
    return [aligned([HEAD, *map(cells, race.lines)]), explained(race, seeds), *verdict(race)]


def _flat(race: Race, line: Line) -> dict[str, Any]:
    fields = line._asdict()
    row = fields.pop("row")
    return {
        "variant": race.variant,
        "optimizer": label(line),
        "dtype": row.series.dtype,
        "target": race.target,
        "learning_rate": row.learning_rate,
        "seeds": len(row.records),
        "update_ms": row.update_ms,
        "state_bytes": row.state_bytes,
    } | fields


def write(c: Comparison, store: Store, found: list[Race], results: dict[str, Any]) -> list[Path]:
    """Writes the results file, with the races in it, and the table as CSV."""
    rows = [jsonable(_flat(race, line)) for race in found for line in race.lines]
    path = store.folder / TABLE
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return [store.write_results(results | {"seeds": c.seeds, "benchmark": rows}), path]
