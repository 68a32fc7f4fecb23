"""From a comparison to its list of runs."""

import json
from typing import Any, NamedTuple

from kradagrad_jax.experiments.config import Comparison
from kradagrad_jax.experiments.names import UsageError
from kradagrad_jax.experiments.optimizers import resolve


class Series(NamedTuple):
    """One row of the table: an optimizer in one precision on one variant of the task.

    Attributes:
      key: ``variant/optimizer/dtype``, and the schedule's length where there are several; unique in
        a comparison.
      variant: name of the variant, ``""`` where there is only one.
      optimizer: name of the optimizer's table in the configuration.
      label: what to call it.
      dtype: of statistics and roots.
      learning_rates: the grid.
      settings: everything but learning rate and seed that decides the outcome.
    """

    key: str
    variant: str
    optimizer: str
    label: str
    dtype: str
    learning_rates: tuple[float, ...]
    settings: dict[str, Any]


class Run(NamedTuple):
    """One training run."""

    series: Series
    learning_rate: float
    seed: int

    @property
    def identity(self) -> str:
        """Equal for runs with equal outcome: what ``--resume`` goes by."""
        return run_identity(self.series.settings, self.learning_rate, self.seed)


def run_identity(settings: dict[str, Any], learning_rate: float, seed: int) -> str:
    """See :attr:`Run.identity`."""
    return json.dumps([settings, learning_rate, seed], sort_keys=True)


def _series(c: Comparison, variant: str, key: str, dtype: str, steps: int) -> Series:
    optimizer = c.optimizers[key]
    options = dict(optimizer.options)
    if dtype != "float32":
        options["factor_dtype"] = dtype
    name, label = optimizer.name or key, optimizer.label or key
    try:
        resolve(name, options)
    except UsageError as error:
        raise UsageError(f"[optimizers.{key}]: {error}") from error
    settings = {
        "task": c.task,
        "task_options": c.task_options | c.variants.get(variant, {}),
        "steps": steps,
        "eval_every": c.eval_every,
        "schedule": c.schedule,
        "optimizer": name,
        "options": options,
        "dtype": dtype,
    }
    if len(optimizer.dtypes) > 1:
        label = f"{label}, {dtype}"
    ending = ""
    if len(optimizer.schedule_lengths) > 1:
        ending, label = str(steps), f"{label}, {steps} steps"
    unique = "/".join(part for part in (variant, key, dtype, ending) if part)
    return Series(unique, variant, key, label, dtype, optimizer.learning_rates, settings)


def all_series(c: Comparison, only: tuple[str, ...] = ()) -> list[Series]:
    """The rows of the comparison's table, checked without running anything.

    Args:
      c: the comparison.
      only: optimizers to keep, all by default.

    Raises:
      UsageError: unknown optimizer or option.
    """
    for key in only:
        if key not in c.optimizers:
            raise UsageError(f"--only {key}: the configuration has {', '.join(c.optimizers)}")
    return [
        _series(c, variant, key, dtype, steps)
        for variant in (c.variants or {"": {}})
        for key in c.optimizers
        if not only or key in only
        for dtype in c.optimizers[key].dtypes
        for steps in (c.optimizers[key].schedule_lengths or (c.steps,))
    ]


def runs_of(series: Series, seeds: tuple[int, ...]) -> list[Run]:
    """Learning rates times seeds."""
    return [Run(series, float(rate), seed) for rate in series.learning_rates for seed in seeds]
