"""Runs a comparison: every optimizer, learning rate and seed, one after the other."""

import json
import sys
from typing import Any, NamedTuple

from tqdm import tqdm

from kradagrad_jax.experiments.config import Comparison
from kradagrad_jax.experiments.optimizers import resolve
from kradagrad_jax.experiments.plan import Run, Series, run_identity, runs_of
from kradagrad_jax.experiments.records import Record, from_json
from kradagrad_jax.experiments.store import Store
from kradagrad_jax.experiments.tasks import make_task
from kradagrad_jax.experiments.training import (
    Cost,
    Evaluation,
    Program,
    float64_mode,
    measure_cost,
)


class Findings(NamedTuple):
    """All that is known after a comparison, complete or not.

    Attributes:
      records: finished runs by the key of their series.
      costs: by the key of the series.
      missing: number of runs that an interruption left out.
      done: number of runs of this call; the others come from the log.
    """

    records: dict[str, list[Record]]
    costs: dict[str, Cost]
    missing: int
    done: int = 0


class Progress:
    """A bar on a terminal, one line per finished run elsewhere; both on stderr."""

    def __init__(self, runs: list[Run]):
        self.runs, self.done = len(runs), 0
        steps = sum(run.series.settings["steps"] for run in runs)
        self._terminal = sys.stderr.isatty()
        self._bar = tqdm(total=steps, unit="step", disable=not self._terminal, leave=False)

    def start(self, run: Run) -> None:
        self._bar.set_description(f"{run.series.label}, lr {run.learning_rate:g}")

    def advance(self, steps: int) -> None:
        self._bar.update(steps)

    def finish(self, run: Run, record: Record, select: str) -> None:
        self.done += 1
        left_out = run.series.settings["steps"] - record.curve[-1].step  # by a diverged run
        self._bar.update(left_out)
        if not self._terminal:
            end = "diverged" if record.diverged else f"loss {record.loss(select):.4g}"
            name = " ".join(part for part in (run.series.variant, run.series.label) if part)
            print(
                f"[{self.done}/{self.runs}] {name}, lr {run.learning_rate:g}, seed {run.seed}: "
                f"{end} in {record.curve[-1].seconds:.1f} s",
                file=sys.stderr,
                flush=True,
            )

    def close(self) -> None:
        self._bar.close()


def _known(store: Store) -> tuple[dict[str, Record], dict[str, Cost]]:
    """Finished runs by identity and costs by settings, from the log."""
    records = {
        run_identity(e["settings"], e["learning_rate"], e["seed"]): from_json(e)
        for e in store.events("run")
    }
    costs = {
        json.dumps(e["settings"], sort_keys=True): Cost(**e["cost"]) for e in store.events("cost")
    }
    return records, costs


class _Worker:
    """Builds tasks and programs when a run first needs them."""

    def __init__(self) -> None:
        self._tasks: dict[str, Any] = {}
        self._series, self._program = "", None

    def task(self, series: Series) -> Any:
        options = series.settings["task_options"]
        key = json.dumps(options, sort_keys=True)
        if key not in self._tasks:
            self._tasks[key] = make_task(series.settings["task"], options)
        return self._tasks[key]

    def program(self, series: Series) -> Program:
        if self._program is None or self._series != series.key:
            s = series.settings
            self._program = Program(
                self.task(series),
                resolve(s["optimizer"], s["options"]),
                s["steps"],
                s["eval_every"],
                s["schedule"],
            )
            self._series = series.key
        return self._program

    def mode(self, series: Series) -> Any:
        return float64_mode(self.task(series).x64 or series.dtype == "float64")


def _train(run: Run, program: Program, store: Store, progress: Progress) -> Record:
    """One run, every evaluation logged as it comes."""
    progress.start(run)
    curve: list[Evaluation] = []
    for point in program.train(run.seed, run.learning_rate):
        where = {"series": run.series.key, "learning_rate": run.learning_rate, "seed": run.seed}
        store.log("evaluation", **where, **point._asdict())
        progress.advance(point.step - (curve[-1].step if curve else 0))
        curve.append(point)
    record = Record(run.learning_rate, run.seed, curve)
    store.log("run", settings=run.series.settings, **record.to_json())
    return record


def _cost(series: Series, program: Program, store: Store) -> Cost:
    cost = measure_cost(program)
    store.log("cost", settings=series.settings, cost=cost._asdict())
    return cost


def execute(c: Comparison, rows: list[Series], store: Store) -> Findings:
    """Runs what the log does not hold yet. Ctrl-C ends it early, with what is finished.

    Args:
      c: the comparison.
      rows: its series, from :func:`plan.all_series`.
      store: where every evaluation and finished run is logged.
    """
    known, known_costs = _known(store)
    wanted = [run for series in rows for run in runs_of(series, c.seeds)]
    records: dict[str, list[Record]] = {series.key: [] for series in rows}
    costs: dict[str, Cost] = {}
    todo = []
    for run in wanted:
        if run.identity in known:
            records[run.series.key].append(known[run.identity])
        else:
            todo.append(run)
    for series in rows:
        settings = json.dumps(series.settings, sort_keys=True)
        if settings in known_costs:
            costs[series.key] = known_costs[settings]
    progress, worker, done = Progress(todo), _Worker(), 0
    try:
        for run in todo:
            with worker.mode(run.series):
                program = worker.program(run.series)
                record = _train(run, program, store, progress)
                records[run.series.key].append(record)  # first: an interruption loses nothing
                done += 1
                progress.finish(run, record, c.select)
                if run.series.key not in costs:
                    costs[run.series.key] = _cost(run.series, program, store)
    except KeyboardInterrupt:
        pass  # the caller reports what is missing
    finally:
        progress.close()
    return Findings(records, costs, len(todo) - done, done)
