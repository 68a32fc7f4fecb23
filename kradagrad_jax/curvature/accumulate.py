"""Statistics of several micro-batches as those of one batch."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kradagrad_jax.curvature.container import Curvature


class AccumulatorState(NamedTuple):
    """State of :func:`accumulate_curvature`: micro-steps taken (int32) and their sum."""

    count: jax.Array
    total: Curvature


class Accumulator(NamedTuple):
    """A pair of pure functions, as ``optax.GradientTransformation`` is."""

    init: Callable[[Curvature], AccumulatorState]
    update: Callable[[Curvature, AccumulatorState], tuple[Curvature, AccumulatorState]]


def accumulate_curvature(k: int) -> Accumulator:
    """Sums the statistics of k micro-batches, for use beside ``optax.MultiSteps(tx, k)``.

    ``MultiSteps`` averages gradients over k micro-steps, but hands the curvature of each micro-step
    on as it is: the optimizer would see the last micro-batch only. With the sums of this function
    it sees, at the step that counts, the statistics of all k.

    Args:
      k: number of micro-steps.

    Returns:
      ``init(curvature) -> state``, from any Curvature of the same model (or the result of
      ``jax.eval_shape``), and ``update(curvature, state) -> (sum so far, state)``; after k
      micro-steps the sum starts anew.

    Raises:
      ValueError: ``k < 1``, or raw statistics: those would grow with every step.

    Examples:
      >>> import jax.numpy as jnp
      >>> from kradagrad_jax import curvature
      >>> def loss(params, x):
      ...     return jnp.mean((x @ params["w"]) ** 2)
      >>> step = curvature.value_grad_and_curvature(loss)
      >>> _, _, curv = step({"w": jnp.ones((3, 2))}, jnp.ones((5, 3)))
      >>> accumulator = curvature.accumulate_curvature(2)
      >>> state = accumulator.init(curv)
      >>> for _ in range(2):
      ...     total, state = accumulator.update(curv, state)
      >>> int(total.terms), int(state.count)
      (10, 0)
    """
    if k < 1:
        raise ValueError(f"accumulate_curvature needs k >= 1, got {k}")

    def init(curvature: Curvature) -> AccumulatorState:
        if curvature.reducer == "raw":
            raise ValueError(
                "raw statistics grow with every micro-step; capture with reducer='kron', or add "
                "the k Curvature objects of one step by hand"
            )
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), curvature)
        return AccumulatorState(jnp.zeros((), jnp.int32), zeros)

    def update(curvature: Curvature, state: AccumulatorState) -> tuple[Curvature, AccumulatorState]:
        total = state.total + curvature
        last = state.count + 1 >= k
        kept = jax.tree.map(lambda x: jnp.where(last, jnp.zeros_like(x), x), total)
        return total, AccumulatorState(jnp.where(last, 0, state.count + 1), kept)

    return Accumulator(init, update)
