"""Numbers that may be schedules, and the weights of averages."""

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


def is_number(value: Any, number: float) -> bool:
    """Whether a setting is this Python number; a traced one is not."""
    return isinstance(value, (int, float)) and value == number


def averaged(beta: Any) -> str:
    """``"sum"`` for a decay that is the Python number 1, else ``"average"``."""
    return "sum" if is_number(beta, 1) else "average"


def share_of_newest(averaging: str, beta: Any, number: jax.Array, dtype: Any) -> jax.Array:
    """Share of the newest of ``number`` statistics in their average with decay ``beta``.

    ``averaging``: ``"corrected"``: weighted mean; ``"capped"``: plain mean at first (arXiv
    1503.05671 section 5); else ``1 - beta`` from the first on.
    """
    beta = jnp.asarray(beta, dtype)
    if averaging == "corrected":
        return corrected_share(beta, number, dtype)
    return jnp.maximum(1 / number.astype(dtype), 1 - beta) if averaging == "capped" else 1 - beta


def corrected_share(beta: Any, number: jax.Array, dtype: Any) -> jax.Array:
    """Share of the newest of ``number`` statistics in their weighted mean with decay ``beta``.

    ``(1 - beta) / (1 - beta^number)``: 1 for the first; for ``beta = 1`` the plain mean.
    """
    b, n = jnp.asarray(beta).astype(dtype), number.astype(dtype)
    plain = b == 1
    b = jnp.where(plain, 0.5, b)
    return jnp.where(plain, 1 / n, (1 - b) / (1 - b**n))


def weights(beta2: Any, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """Weights of the old statistic and of the new one; ``beta2 = 1`` means a sum."""
    b = jnp.asarray(beta2, dtype)
    return b, jnp.where(b == 1, jnp.ones_like(b), 1 - b)


def total_weight(beta2: Any, taken: jax.Array, dtype: Any) -> jax.Array:
    """Sum of the weights of an average after ``taken`` statistics; 1 for a sum."""
    b = jnp.asarray(beta2, dtype)
    correction = 1 - b ** jnp.maximum(taken, 1).astype(dtype)
    return jnp.where(b == 1, jnp.ones_like(b), correction)
