"""Numbers that may be schedules."""

from typing import Any

import jax
import jax.numpy as jnp

from kradagrad_jax.factors.method import Step


def at_step(value: Any, step: Step, dtype: Any = None) -> jax.Array:
    """A number or an optax schedule (which counts from 0) at this step: a scalar.

    It is cast to ``dtype``; with None it keeps its own.
    """
    now = jnp.asarray(value(step.count - 1) if callable(value) else value)
    return now if dtype is None else now.astype(dtype)
