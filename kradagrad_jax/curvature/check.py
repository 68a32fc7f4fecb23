"""Proof on the user's own model: the captured inputs and gradients rebuild the gradient."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kradagrad_jax.curvature.assemble import assemble
from kradagrad_jax.curvature.capture import BatchArgnums, Run
from kradagrad_jax.curvature.parts import Part
from kradagrad_jax.curvature.plan import Plan
from kradagrad_jax.curvature.prepare import Prepared, prepare
from kradagrad_jax.curvature.reducers import Reducer
from kradagrad_jax.curvature.spec import LeafSpec
from kradagrad_jax.engine.trees import paths_of


def check(
    loss_fn: Callable[..., Any],
    params: Any,
    *args: Any,
    has_aux: bool = False,
    batch_argnums: BatchArgnums = None,
    verbose: bool = True,
) -> dict[str, float]:
    """Compares ``sum over uses of a^T g`` with the gradient, leaf by leaf.

    Args:
      loss_fn: ``loss_fn(params, *args)``, as for :func:`value_grad_and_curvature`.
      params: pytree of floating-point arrays.
      *args: further arguments; the batch is axis 0.
      has_aux: whether ``loss_fn`` returns ``(loss, aux)``.
      batch_argnums: see :func:`inspect`.
      verbose: print a table.

    Returns:
      Per matched path the largest deviation divided by the largest entry of all gradients: about
      the rounding error of the dtype for status ``full``; for ``inexact`` what the other uses
      contribute.

    Raises:
      ValueError: as :func:`inspect`.

    Examples:
      >>> import jax.numpy as jnp
      >>> from kradagrad_jax import curvature
      >>> def loss(params, x):
      ...     return jnp.mean((x @ params["w"]) ** 2)
      >>> params = {"w": jnp.ones((3, 2))}
      >>> curvature.check(loss, params, jnp.ones((5, 3)), verbose=False)["w"] < 1e-6
      True
    """
    ready = prepare(loss_fn, params, args, batch_argnums)
    ready.check_results(has_aux, "loss_fn", scalar=True)
    identity = Reducer("identity")
    leaves = jax.tree.leaves(params)

    @jax.jit
    def both(leaves: list[Any]) -> Any:
        run = Run(ready, identity, True, None, 1.0)
        gradient = jax.grad(run.results, argnums=(0, 1), has_aux=True)
        (stats, grads), _ = gradient(run.sinks, leaves, has_aux)
        return assemble(ready.plan, identity, stats, 1.0), grads

    held, grads = both(leaves)
    by_path = dict(zip(paths_of(params), grads, strict=True))
    largest = max(float(jnp.max(jnp.abs(g))) for g in grads if g.size) or 1.0
    residuals = {}
    for path, parts in held.items():
        rebuilt = _rebuilt(ready.plan, path, parts, by_path[path])
        error = float(jnp.max(jnp.abs(rebuilt - by_path[path])))
        residuals[path] = error / largest if math.isfinite(largest) else math.nan
    if verbose:
        print(_table(ready, residuals))
    return residuals


def _rebuilt(plan: Plan, path: str, parts: tuple[Part, ...], like: jax.Array) -> jax.Array:
    """The gradient of a leaf from ``sum a g^T`` of its uses."""
    if path not in {layer.path for layer in plan.spec.layers}:
        view = plan.elementwise[path]
        return view.from_matrix(parts[0]["W"].reshape(view.target)).reshape(like.shape)
    layer = plan.spec.layer(path)
    first = layer.from_matrix(parts[0]["W"])
    if not layer.tied:
        return first
    return first + layer.from_matrix(jnp.swapaxes(parts[1]["W"], 1, 2))


def _table(ready: Prepared, residuals: dict[str, float]) -> str:
    def row(leaf: LeafSpec) -> tuple[str, str, str]:
        value = residuals.get(leaf.path)
        shown = "-" if value is None else f"{value:.1e}"
        if value is None and leaf.bias_of:
            shown = f"with {leaf.bias_of}"
        return leaf.path, leaf.status, shown

    rows = [("parameter", "status", "residual"), *map(row, ready.plan.spec.leaves)]
    widths = [max(len(r[i]) for r in rows) for i in range(3)]
    return "\n".join(
        "  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in rows
    )
