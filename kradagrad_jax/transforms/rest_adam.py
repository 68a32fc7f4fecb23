"""Adam for parameters without factors, beside methods whose momentum is in their factors."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from kradagrad_jax.engine.layout import factor_dtype_of
from kradagrad_jax.factors.eigenbasis import limited, whitened
from kradagrad_jax.factors.numbers import total_weight
from kradagrad_jax.factors.soap import moment_correction


class RestState(NamedTuple):
    """Number of gradients, their average and that of their squares (float32 or better)."""

    count: jax.Array
    mean: Any
    squares: Any


def rest_adam(
    beta1: Any,
    beta2: Any,
    eps: Any,
    *,
    late: bool = False,
    bias_correction: bool = True,
    normalize: bool = False,
) -> optax.GradientTransformation:
    """Adam, or what it becomes in the official SOAP where nothing is rotated.

    Args:
      beta1, beta2, eps: as Adam's.
      late: the first gradient gives no step and is in neither average; epsilon is added before
        the bias correction.
      bias_correction: whether there is one.
      normalize: steps have a root mean square of one.
    """

    def init(params: Any) -> RestState:
        zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, factor_dtype_of(p.dtype)), params)
        return RestState(jnp.zeros((), jnp.int32), zeros, jax.tree.map(jnp.copy, zeros))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, RestState]:
        del params
        count = state.count + 1
        used = (count > 1) if late else True

        def average(beta: Any, old: jax.Array, new: jax.Array) -> jax.Array:
            b = jnp.asarray(beta, old.dtype)
            return jnp.where(used, b * old + (1 - b) * new.astype(old.dtype), old)

        mean = jax.tree.map(lambda m, g: average(beta1, m, g), state.mean, updates)
        squares = jax.tree.map(
            lambda v, g: average(beta2, v, jnp.square(g.astype(v.dtype))), state.squares, updates
        )

        def direction(m: jax.Array, v: jax.Array) -> jax.Array:
            first, second = (total_weight(b, count, m.dtype) for b in (beta1, beta2))
            if not bias_correction:
                first = second = jnp.ones((), m.dtype)
            return limited(whitened(m / first, v / second, eps, "absolute"), normalize)

        def late_direction(m: jax.Array, v: jax.Array) -> jax.Array:
            u = limited(whitened(m, v, eps, "absolute"), normalize)
            scale = moment_correction(beta1, beta2, count - 1, m.dtype) if bias_correction else 1
            return u * scale

        take = late_direction if late else direction
        return jax.tree.map(take, mean, squares), RestState(count, mean, squares)

    return optax.GradientTransformation(init, update)
