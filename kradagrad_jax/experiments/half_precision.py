"""A small transformer trained in bfloat16: SINGD, and classic K-FAC with rounded statistics.

    python -m kradagrad_jax.experiments.half_precision [--steps 1000] [--only NAME]

The model computes in bfloat16, its parameters stay float32. One row per optimizer: validation loss,
and every number that was not finite: losses of steps, gradients (the engine skips such a step),
block updates and refreshes (the engine undoes them), numbers left in parameters and state.
"""

import argparse
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from kradagrad_jax.engine import BlockState
from kradagrad_jax.experiments.optimizers import resolve
from kradagrad_jax.experiments.statistics import measure, spec_of
from kradagrad_jax.experiments.tasks import Task, make_task
from kradagrad_jax.experiments.training import learning_rate_schedule

TASK: dict[str, Any] = {
    "length": 32, "layers": 2, "width": 32, "heads": 2, "batch_size": 8, "dtype": "bfloat16",
}  # fmt: skip


class Case(NamedTuple):
    """An optimizer of the table.

    Attributes:
      optimizer: its name in the registry.
      options: what differs from its entry there.
      learning_rate: peak of a cosine schedule.
      rounded: round the statistics to bfloat16 before the optimizer sees them.
    """

    optimizer: str
    options: dict[str, Any]
    learning_rate: float = 1e-2
    rounded: bool = False


class Outcome(NamedTuple):
    """What a run ended with.

    Attributes:
      start, end: validation loss before and after.
      losses: number of steps whose loss was not finite.
      skipped: number of steps whose gradient was not finite.
      rejected: number of block updates or refreshes that were undone.
      left: number of non-finite numbers in parameters and state.
    """

    start: float
    end: float
    losses: int
    skipped: int
    rejected: int
    left: int


_BF16 = jnp.bfloat16
CASES = {
    "AdamW": Case("adamw", {}),
    "SINGD dense": Case("singd", {"structures": "dense"}),
    "SINGD dense, factors bf16": Case(
        "singd", {"structures": "dense", "lr_cov": 0.1, "factor_dtype": _BF16}
    ),
    "SINGD hierarchical": Case("singd", {"structures": "hierarchical:15,15"}),
    "SINGD hierarchical, factors bf16": Case(
        "singd", {"structures": "hierarchical:15,15", "lr_cov": 0.1, "factor_dtype": _BF16}
    ),
    "K-FAC": Case("kfac", {}),
    "K-FAC, statistics bf16": Case("kfac", {}, rounded=True),
    "K-FAC, own length": Case("kfac", {"preset": "official", "damping": 1e-4}, 1e-3),
    "K-FAC, own length, statistics bf16": Case(
        "kfac", {"preset": "official", "damping": 1e-4}, 1e-3, rounded=True
    ),
}


def rounded(tree: Any) -> Any:
    """Every float of a tree rounded to bfloat16, in the dtype that it has."""

    def one(x: jax.Array) -> jax.Array:
        return x.astype(_BF16).astype(x.dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x

    return jax.tree.map(one, tree)


def _bad(tree: Any) -> jax.Array:
    """Number of non-finite numbers."""
    floats = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)]
    return sum((jnp.sum(~jnp.isfinite(x)) for x in floats), jnp.zeros((), jnp.int32))


def _counter(state: Any, name: str) -> int:
    """Sum of a counter over the parts of a state that the engine keeps."""
    parts = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, BlockState))
    return sum(int(getattr(x, name)) for x in parts if isinstance(x, BlockState))


def train(case: Case, task: Task, steps: int, seed: int = 0) -> Outcome:
    """Trains to the end, whatever happens.

    Raises:
      UsageError: unknown optimizer or option.
    """
    recipe = resolve(case.optimizer, case.options)
    rate = learning_rate_schedule("cosine", case.learning_rate, steps)
    spec = spec_of(task) if recipe.wants_spec else None
    tx = optax.with_extra_args_support(recipe(rate, spec))
    gradient, key = measure(task, recipe.capture), jax.random.key(seed)
    params, data = task.setup(seed)

    def step(carry: Any, batch: jax.Array) -> tuple[Any, jax.Array]:
        params, state, count = carry
        loss, grads, extra = gradient(params, data, batch, key, count)
        updates, state = tx.update(
            grads, state, params, **(rounded(extra) if case.rounded else extra)
        )
        return (optax.apply_updates(params, updates), state, count + 1), ~jnp.isfinite(loss)

    evaluate = jax.jit(task.evaluate)
    start = float(evaluate(params, data)["loss"])
    carry = (params, tx.init(params), jnp.zeros((), jnp.int32))
    batches = jnp.asarray(task.order(seed, steps))
    (params, state, _), bad = jax.jit(lambda c, b: jax.lax.scan(step, c, b))(carry, batches)
    end = float(evaluate(params, data)["loss"])
    counters = (_counter(state, "skipped"), _counter(state, "rejected"))
    return Outcome(start, end, int(jnp.sum(bad)), *counters, int(_bad((params, state))))


def table(cases: dict[str, Case], steps: int) -> dict[str, Outcome]:
    """Trains and prints row by row; the outcomes by name."""
    task = make_task("characters", TASK)
    print(f"{'':36}    loss  non-finite: losses  gradients  undone  left  ({steps} steps)")
    found = {}
    for name, case in cases.items():
        found[name] = o = train(case, task, steps)
        row = f"{o.losses:19} {o.skipped:10} {o.rejected:7} {o.left:5}"
        print(f"{name:36} {o.end:7.3f} {row}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--only", action="append", choices=list(CASES))
    args = parser.parse_args()
    table({name: CASES[name] for name in args.only or CASES}, args.steps)


if __name__ == "__main__":
    main()
