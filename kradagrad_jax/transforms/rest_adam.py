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
    """Averages for :func:`rest_adam`, in float32 or better; empty parameters have none.

    Attributes:
      count: number of gradients.
      mean: their average; None where there is none.
      squares: that of their squares.
    """

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
      beta1, beta2, eps: as Adam's; without the average of gradients where ``beta1`` is None.
      late: the first gradient gives no step and is in neither average; epsilon is added before
        the bias correction.
      bias_correction: whether there is one.
      normalize: divides by the root mean square.
    """

    def zeros(params: Any) -> Any:
        def one(p: jax.Array) -> Any:
            if not p.size:
                return optax.MaskedNode()
            return jnp.zeros_like(p, dtype=factor_dtype_of(p.dtype))  # keeps its sharding

        return jax.tree.map(one, params)

    def init(params: Any) -> RestState:
        mean = None if beta1 is None else zeros(params)
        return RestState(jnp.zeros((), jnp.int32), mean, zeros(params))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, RestState]:
        del params
        count = state.count + 1
        used = (count > 1) if late else True

        def average(beta: Any, old: Any, g: jax.Array, square: bool) -> Any:
            if not g.size:
                return old
            b, g = jnp.asarray(beta, old.dtype), g.astype(old.dtype)
            return jnp.where(used, b * old + (1 - b) * (g * g if square else g), old)

        def direction(g: jax.Array, v: Any, m: Any) -> jax.Array:
            if not g.size:
                return g
            m = jnp.where(used, g.astype(v.dtype), 0) if m is None else m
            if late or not bias_correction:
                u = limited(whitened(m, v, eps, "absolute"), normalize)
                if not bias_correction:
                    return u
                return u * moment_correction(beta1, beta2, count - 1, m.dtype)
            first = 1 if beta1 is None else total_weight(beta1, count, m.dtype)
            second = total_weight(beta2, count, m.dtype)
            return limited(whitened(m / first, v / second, eps, "absolute"), normalize)

        gs, treedef = jax.tree.flatten(updates)
        vs = treedef.flatten_up_to(state.squares)
        vs = [average(beta2, v, g, True) for v, g in zip(vs, gs, strict=True)]
        ms: list[Any] = [None] * len(gs)
        if beta1 is not None:
            ms = treedef.flatten_up_to(state.mean)
            ms = [average(beta1, m, g, False) for m, g in zip(ms, gs, strict=True)]
        out = [direction(g, v, m) for g, v, m in zip(gs, vs, ms, strict=True)]
        mean = None if beta1 is None else treedef.unflatten(ms)
        return treedef.unflatten(out), RestState(count, mean, treedef.unflatten(vs))

    return optax.GradientTransformation(init, update)
