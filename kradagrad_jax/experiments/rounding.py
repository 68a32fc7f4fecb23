"""What stochastic rounding to bfloat16 would gain: for SINGD's factors, and for parameters."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from kradagrad_jax.experiments.optimizers import resolve
from kradagrad_jax.experiments.statistics import measure, spec_of
from kradagrad_jax.experiments.tasks import Task, make_task
from kradagrad_jax.factors.method import Grams, Step
from kradagrad_jax.factors.singd import SingdOptions, singd_method
from kradagrad_jax.transforms.rounding import stochastic_round

Rounding = Callable[[jax.Array, jax.Array], jax.Array]


def keep(x: jax.Array, key: jax.Array) -> jax.Array:
    """No rounding."""
    del key
    return x


def nearest(x: jax.Array, key: jax.Array) -> jax.Array:
    """The nearest bfloat16, in float32."""
    del key
    return x.astype(jnp.bfloat16).astype(jnp.float32)


def stochastic(x: jax.Array, key: jax.Array) -> jax.Array:
    """One of the two neighbours in bfloat16, the mean being x; in float32."""
    return stochastic_round(x, key).astype(jnp.float32)


def _over(rounding: Rounding, tree: Any, key: jax.Array) -> Any:
    leaves, treedef = jax.tree.flatten(tree)
    keys = jax.random.split(key, len(leaves))
    return treedef.unflatten([rounding(x, k) for x, k in zip(leaves, keys, strict=True)])


def inverse_error(
    rounding: Rounding, lr_cov: float, half: bool = False, size: int = 32, steps: int = 4000
) -> float:
    """Error of IKFAC's ``K K^T`` against the inverse that it tends to, of condition 1e4.

    Args:
      rounding: what happens to the factors after each step, which is taken in float32.
      lr_cov: the factor step.
      half: the step itself is taken in bfloat16, as ``factor_dtype=bfloat16`` does.
      size: of the factor.
      steps: number of factor steps.
    """
    rng, damping = np.random.default_rng(0), 1e-2
    basis = np.linalg.qr(rng.standard_normal((size, size)))[0]
    u = (basis * np.logspace(0, -4, size)) @ basis.T
    dtypes = (jnp.bfloat16, jnp.bfloat16) if half else (None, None)
    method = singd_method(
        SingdOptions(
            adaptive=False,
            damping=damping,
            lr_cov=lr_cov,
            riemannian_momentum=0.0,
            factor_dtypes=dtypes,
        )
    )
    statistic = Grams(jnp.asarray(u, jnp.float32), jnp.asarray(u, jnp.float32))

    def body(k: jax.Array, factor: Any) -> Any:
        step = Step(k + 1, 1, k + 1, k)
        factor = method.accumulate(factor, statistic, step)
        return factor if half else _over(rounding, factor, jax.random.fold_in(jax.random.key(0), k))

    factor = method.init((size, size), jnp.float32)
    factor = jax.jit(lambda f: jax.lax.fori_loop(0, steps, body, f))(factor)
    root = np.asarray(factor.k, np.float64)
    exact = np.linalg.inv(u + damping * np.eye(size))
    return float(np.linalg.norm(root @ root.T - exact) / np.linalg.norm(exact))


def trained(name: str, options: dict[str, Any], rate: float, task: Task, steps: int) -> list[float]:
    """Validation losses with parameters in float32, and in bfloat16 by both roundings."""
    recipe = resolve(name, options)
    spec = spec_of(task) if recipe.wants_spec else None
    tx = optax.with_extra_args_support(recipe(rate, spec))
    gradient, batches = measure(task, recipe.capture), jnp.asarray(task.order(0, steps))
    key = jax.random.key(0)

    def run(rounding: Rounding) -> float:
        params, data = task.setup(0)
        params = _over(nearest, params, key)

        def step(carry: Any, batch: jax.Array) -> tuple[Any, None]:
            params, state, count = carry
            _, grads, extra = gradient(params, data, batch, key, count)
            updates, state = tx.update(grads, state, params, **extra)
            moved = optax.apply_updates(params, updates)
            return (_over(rounding, moved, jax.random.fold_in(key, count)), state, count + 1), None

        start = (params, tx.init(params), jnp.zeros((), jnp.int32))
        end = jax.jit(lambda c: jax.lax.scan(step, c, batches)[0][0])(start)
        return float(jax.jit(task.evaluate)(end, data)["loss"])

    return [run(r) for r in (keep, nearest, stochastic)]


PARAMETERS = {
    "adamw": ({}, 1e-3),
    "shampoo": ({}, 1e-3),
    "kfac": ({}, 1e-3),
    "singd": ({}, 1e-3),
}


def tables(steps: int = 500) -> None:
    """Prints both comparisons in markdown."""
    print("Relative error of K K^T (IKFAC, d = 32, condition 1e4, damping 1e-2, 4000 steps)\n")
    print("| `lr_cov` | float32 | bf16 | float32, stored in bf16 | the same, stochastic |")
    print("|---" * 5 + "|")
    for lr_cov in (0.01, 0.03, 0.1, 0.3, 1.0):
        row = [
            inverse_error(keep, lr_cov),
            inverse_error(keep, lr_cov, half=True),
            inverse_error(nearest, lr_cov),
            inverse_error(stochastic, lr_cov),
        ]
        print(f"| {lr_cov} | " + " | ".join(f"{x:.1e}" for x in row) + " |", flush=True)
    print(f"\nValidation loss on digits after {steps} steps\n")
    print("| | rate | float32 parameters | bf16 | bf16, stochastic |\n" + "|---" * 5 + "|")
    task = make_task("digits", {"widths": [64]})
    for name, (options, rate) in PARAMETERS.items():
        losses = trained(name, options, rate, task, steps)
        cells = " | ".join(f"{x:.4f}" for x in losses)
        print(f"| `{name}` | {rate} | {cells} |", flush=True)
