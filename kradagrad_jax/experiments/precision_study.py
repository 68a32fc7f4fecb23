"""How far every method gets from its float64 trajectory in lower precision.

    python -m kradagrad_jax.experiments.precision_study [--steps 50] [--only NAME] [--rounding]

An MLP on digits. The model is computed in float64 whatever the column: all rounding is that of
gradients and statistics (to the column's dtype), of the optimizer, and of the parameters. Two
tables: the relative error of ``p_T - p_0`` where every column is given the gradients and statistics
of the float64 run, and the validation loss where every column takes its own.
"""

import argparse
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from kradagrad_jax.experiments import rounding
from kradagrad_jax.experiments.optimizers import resolve
from kradagrad_jax.experiments.statistics import measure, spec_of
from kradagrad_jax.experiments.tasks import Task, make_task
from kradagrad_jax.experiments.training import float64_mode

TASK: dict[str, Any] = {"widths": [64], "batch_size": 16}
BF16, FP16, F32, F64 = jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64


class Case(NamedTuple):
    """A method of the tables.

    Attributes:
      rate: learning rate.
      options: what differs from the registry's entry.
      half: options that store factors in bfloat16; None: the method does not.
    """

    rate: float
    options: dict[str, Any]
    half: dict[str, Any] | None = None


class Column(NamedTuple):
    """A choice of dtypes.

    Attributes:
      params: dtype of parameters, and of what the optimizer is given and returns.
      given: dtype to which gradients and statistics are rounded before that.
      half_factors: whether factors are stored in bfloat16.
    """

    params: Any
    given: Any
    half_factors: bool = False


_FACTORS = {"factor_dtype": BF16}
_SKETCH = {"sketch": {"rank": 16, "oversampling": 4}, "refresh_every": 5}
_ONLINE = _SKETCH | {"online": {"batch_size": 16}}
CASES = {
    "shampoo": Case(1e-2, {"refresh_every": 5}),
    "shampoo_sqrt": Case(1e-2, {"refresh_every": 5}),
    "kradagrad_star": Case(1e-2, {"refresh_every": 5}),
    "kradagrad": Case(1e-2, {"refresh_every": 5}),
    "sirfshampoo": Case(1e-2, {"batch_size": 16}, _FACTORS),
    "tnt": Case(1e-3, {"refresh_every": 5}),
    "ginger": Case(1e-3, {}, {"basis_dtype": BF16}),
    "kfac": Case(1e-2, {"refresh_every": 5}),
    "kfac_sqrt": Case(1e-2, {"refresh_every": 5}),
    "rs_kfac": Case(3e-2, _SKETCH),
    "sre_kfac": Case(3e-2, _SKETCH),
    "b_kfac": Case(3e-2, _ONLINE),
    "br_kfac": Case(3e-2, _ONLINE),
    "bc_kfac": Case(3e-2, _ONLINE),
    "brc_kfac": Case(3e-2, _ONLINE),
    "ikfac": Case(1e-2, {}, _FACTORS),
    "ingd": Case(1e-2, {}, _FACTORS),
    "singd": Case(1e-2, {"structures": "hierarchical:8,8"}, _FACTORS),
}
COLUMNS = {
    "float32": Column(F32, F32),
    "bf16 + master": Column(F32, BF16),
    "bf16": Column(BF16, BF16),
    "fp16 + master": Column(F32, FP16),
    "fp16": Column(FP16, FP16),
    "bf16 factors": Column(F32, F32, half_factors=True),
}
Update = Callable[..., tuple[Any, Any]]


def rounded(tree: Any, dtype: Any) -> Any:
    """The tree with all its floats in a dtype."""
    return jax.tree.map(
        lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree
    )


class Study:
    """One method: its float64 trajectory, and those of the columns.

    Args:
      name: of the optimizer in the registry.
      case: its learning rate and options.
      task: what is trained.
      steps: length of the trajectories.
    """

    def __init__(self, name: str, case: Case, task: Task, steps: int):
        self.name, self.case, self.steps = name, case, steps
        params, data = task.setup(0)
        # numbers that all dtypes hold
        self.start = rounded(rounded(rounded(params, BF16), FP16), F64)
        self.data = rounded(jax.tree.map(jnp.asarray, data), F64)
        self.batches = jnp.asarray(task.order(0, steps))
        recipe = resolve(name, case.options)
        self.spec = spec_of(task) if recipe.wants_spec else None
        self.measure = jax.jit(measure(task, recipe.capture))
        self.evaluate = jax.jit(task.evaluate)

    def optimizer(self, half_factors: bool) -> optax.GradientTransformationExtraArgs:
        """The method, optionally with factors in bfloat16."""
        more = (self.case.half or {}) if half_factors else {}
        recipe = resolve(self.name, self.case.options | more)
        return optax.with_extra_args_support(recipe(self.case.rate, self.spec))

    def found(self, params: Any, step: int) -> Any:
        """Gradients and statistics in float64 at parameters of any dtype."""
        out = self.measure(
            rounded(params, F64),
            self.data,
            self.batches[step],
            jax.random.key(0),
            jnp.asarray(step),
        )
        return out[1:]

    def trajectory(self, column: Column, given: list[Any] | None, seen: list[Any]) -> Any:
        """Parameters in the end; ``seen`` receives gradients and statistics of every step.

        Args:
          column: the dtypes.
          given: gradients and statistics of every step; None: they are taken where the parameters
            are.
          seen: a list to append to.
        """
        tx, params = self.optimizer(column.half_factors), rounded(self.start, column.params)
        update, state = self._update(tx, column), tx.init(params)
        for step in range(self.steps):
            both = self.found(params, step) if given is None else given[step]
            seen.append(both)
            grads, extra = rounded(rounded(both, column.given), column.params)
            updates, state = update(grads, state, params, **extra)
            params = optax.apply_updates(params, updates)
        return params

    def _update(self, tx: optax.GradientTransformationExtraArgs, column: Column) -> Update:
        """The compiled update, shared by the columns of equal programs."""
        key = (jnp.dtype(column.params).name, column.half_factors)
        known = self.__dict__.setdefault("_programs", {})
        if key not in known:
            known[key] = jax.jit(tx.update)
        return known[key]

    def error(self, ours: Any, exact: Any) -> float:
        """Relative error of the way that the parameters have gone."""
        parts = [jax.tree.leaves(rounded(t, F64)) for t in (ours, exact, self.start)]
        ways = [[np.asarray(x - s) for x, s in zip(t, parts[2], strict=True)] for t in parts[:2]]
        off = sum(float(np.sum((a - b) ** 2)) for a, b in zip(*ways, strict=True))
        return (off / sum(float(np.sum(b**2)) for b in ways[1])) ** 0.5

    def loss(self, params: Any) -> float:
        """Validation loss, in float64."""
        return float(self.evaluate(rounded(params, F64), self.data)["loss"])

    def run(self) -> tuple[dict[str, float | None], dict[str, float | None]]:
        """Errors and losses by column; None where a column does not apply."""
        recorded: list[Any] = []
        exact = self.trajectory(Column(F64, F64), None, recorded)
        errors: dict[str, float | None] = {}
        losses: dict[str, float | None] = {"float64": self.loss(exact)}
        for name, column in COLUMNS.items():
            if column.half_factors and self.case.half is None:
                errors[name] = losses[name] = None
                continue
            errors[name] = self.error(self.trajectory(column, recorded, []), exact)
            losses[name] = self.loss(self.trajectory(column, None, []))
        return errors, losses


def _row(name: str, values: dict[str, float | None], form: str) -> str:
    cells = ["-" if v is None else format(v, form) for v in values.values()]
    return "| " + " | ".join([f"`{name}`", *cells]) + " |"


def _head(columns: list[str]) -> str:
    return "| " + " | ".join(["", *columns]) + " |\n" + "|---" * (len(columns) + 1) + "|"


def tables(names: list[str], steps: int) -> None:
    """Prints both tables in markdown, the first one row by row."""
    task, losses = make_task("digits", TASK), {}
    print(f"Relative error of p_T - p_0 at T = {steps}, gradients of the float64 run\n")
    print(_head(list(COLUMNS)), flush=True)
    for name in names:
        errors, losses[name] = Study(name, CASES[name], task, steps).run()
        print(_row(name, errors, ".1e"), flush=True)
        jax.clear_caches()
    print(f"\nValidation loss after {steps} steps with gradients of its own\n")
    print(_head(["float64", *COLUMNS]))
    for name, row in losses.items():
        print(_row(name, row, ".3f"))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--only", action="append", choices=list(CASES))
    parser.add_argument(
        "--rounding", action="store_true", help="stochastic rounding in their place"
    )
    args = parser.parse_args()
    with float64_mode(True):
        if args.rounding:
            rounding.tables()
        else:
            tables(args.only or list(CASES), args.steps)


if __name__ == "__main__":
    main()
