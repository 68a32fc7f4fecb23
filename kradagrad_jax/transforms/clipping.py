"""Bounds on the length of a layer-wise step: functions of ``{path: (stack, d_in, d_out)}``."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from kradagrad_jax.engine.layers import Clip

Layers = dict[str, jax.Array]


def norm_constraint(kappa: Any, learning_rate: Any) -> Clip:
    """Multiplies all layers by ``min(1, sqrt(kappa / (lr^2 q)))``, q = sum of <update, gradient>.

    The predicted change of the model's distribution ``lr^2 c^2 q`` is thus at most ``kappa``.

    Args:
      kappa: bound, a positive number.
      learning_rate: what the update will be multiplied by: a number or an optax schedule.
    """

    def clip(updates: Layers, gradients: Layers, count: jax.Array) -> Layers:
        products = [jnp.sum(u * gradients[path]) for path, u in updates.items()]
        wide = max((p.dtype for p in products), key=lambda d: jnp.finfo(d).bits)
        q = functools.reduce(jnp.add, [p.astype(wide) for p in products])
        lr = learning_rate(count - 1) if callable(learning_rate) else learning_rate
        change = jnp.square(jnp.asarray(lr).astype(wide)) * q
        scale = jnp.where(change > kappa, jnp.sqrt(kappa / jnp.where(change > 0, change, 1)), 1)
        return {path: u * scale.astype(u.dtype) for path, u in updates.items()}

    return clip


def rms_clip(limit: Any) -> Clip | None:
    """Shortens every layer's update to a root mean square of at most ``limit``; None: no bound."""
    if limit is None:
        return None

    def one(u: jax.Array) -> jax.Array:
        rms = jnp.sqrt(jnp.mean(u * u, axis=(1, 2), keepdims=True))
        return u * jnp.where(rms > limit, limit / jnp.where(rms > 0, rms, 1), 1).astype(u.dtype)

    return lambda updates, gradients, count: {path: one(u) for path, u in updates.items()}


def both(first: Clip | None, second: Clip | None) -> Clip | None:
    """The one after the other; None where there is none."""
    if first is None or second is None:
        return first or second
    return lambda u, g, count: second(first(u, g, count), g, count)
