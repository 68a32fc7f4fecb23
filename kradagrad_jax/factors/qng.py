"""QNG on one block: a quasi-Newton inverse from the last curvature vectors, without damping.

``G_t = a G_(t-1) + (1 - a) h_t h_t^T`` from ``G_0 = I`` is kept as a product of rank-one inverse
roots, ``L_t^-1 = a^(-1/2) (I - k q q^T) L_(t-1)^-1``, of which the last tau are remembered: the
second optimizer of Ginger's authors (their repository; not in arXiv 2402.03295).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kradagrad_jax.factors.method import BlockMethod, Step
from kradagrad_jax.factors.numbers import at_step


class QngFactor(NamedTuple):
    """The newest vectors, newest first; one more than are in use.

    Attributes:
      vectors: ``(tau + 1, d)``: q, zero where there is none yet.
      lengths: ``(tau + 1,)``: their squared norms.
      last: step at which the newest was taken, int32.
    """

    vectors: jax.Array
    lengths: jax.Array
    last: jax.Array


class QngOptions(NamedTuple):
    """Numbers of QNG.

    Attributes:
      decay: a.
      rank: tau, number of vectors in use.
      form: ``"product"``: the inverse as it is meant; ``"additive"``: every inner product is taken
        with what went in, as the authors' code does.
      trust: bound on ``lr^2 <momentum, step> / 2``; None: none. Needs the next two.
      learning_rate: what the direction is multiplied by: a number or a schedule.
      beta1: decay of the sum of gradients that is preconditioned.
    """

    decay: Any = 0.99
    rank: int = 64
    form: str = "product"
    trust: Any = None
    learning_rate: Any = None
    beta1: Any = None


def qng_method(o: QngOptions) -> BlockMethod:
    """The block method, for one long vector; the statistic is ONE curvature vector ``(1, d)``.

    The step uses the curvature of the steps before it.

    Raises:
      ValueError: unknown form, ``trust`` without ``learning_rate`` and ``beta1``; while tracing, a
        block that is no vector and a statistic of several vectors.
    """
    if o.form not in ("product", "additive"):
        raise ValueError(f"form must be 'product' or 'additive', got {o.form!r}")
    if o.trust is not None and (o.learning_rate is None or o.beta1 is None):
        raise ValueError("trust needs learning_rate and beta1: the bound is on the step")

    def init(shape: tuple[int, ...], dtype: Any) -> QngFactor:
        if len(shape) != 1:
            raise ValueError(f"QNG keeps vectors; got a block of shape {shape}")
        pairs = (jnp.zeros((o.rank + 1, *shape), dtype), jnp.zeros(o.rank + 1, dtype))
        return QngFactor(*pairs, jnp.zeros((), jnp.int32))

    def accumulate(factor: QngFactor, vectors: jax.Array, step: Step) -> QngFactor:
        if len(vectors) != 1:
            raise ValueError(f"QNG takes one curvature vector per step, got {len(vectors)}")
        newest = (factor.vectors[:-1], factor.lengths[:-1])
        q = _half(o, newest, step.statistics - 1, vectors[0], oldest_first=True)
        rows = jnp.concatenate([q[None], newest[0]])
        lengths = jnp.concatenate([jnp.sum(q * q)[None], newest[1]])
        return QngFactor(rows, lengths, step.count.astype(jnp.int32))

    def precondition(factor: QngFactor, g: jax.Array, step: Step) -> jax.Array:
        fresh = factor.last == step.count
        before = step.statistics - jnp.where(fresh, 1, 0)
        older = tuple(jnp.where(fresh, x[1:], x[:-1]) for x in (factor.vectors, factor.lengths))
        y = _half(o, older, before, g, oldest_first=True)
        v = _half(o, older, before, y, oldest_first=False)
        return v if o.trust is None else v * _bound(o, g, v, step)

    return BlockMethod(init, accumulate, None, precondition, name=f"qng({o.form})")


def _half(
    o: QngOptions,
    pairs: tuple[jax.Array, ...],
    taken: jax.Array,
    u: jax.Array,
    oldest_first: bool,
) -> jax.Array:
    """``L^-1 u`` (oldest first) or ``L^-T u`` with the last ``tau`` pairs of q and q^T q."""
    vectors, lengths = pairs
    a = jnp.asarray(o.decay).astype(u.dtype)
    k = (1 - jnp.sqrt(a / (a + (1 - a) * lengths))) / jnp.where(lengths > 0, lengths, 1)

    def one(y: jax.Array, pair: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        q, weight = pair
        return y - weight * jnp.sum(q * (y if o.form == "product" else u)) * q, None

    y, _ = jax.lax.scan(one, u, (vectors, k), reverse=oldest_first)
    return y * a ** (-jnp.minimum(taken, o.rank).astype(u.dtype) / 2)


def _bound(o: QngOptions, g: jax.Array, v: jax.Array, step: Step) -> jax.Array:
    """Factor of the step that keeps it in the trust region.

    The engine hands over the bias-corrected average of gradients where the method has their sum.
    """
    beta = jnp.asarray(o.beta1).astype(g.dtype)
    total = (1 - beta ** step.count.astype(g.dtype)) / (1 - beta)
    change = total**2 * jnp.sum(g * v)
    rate = at_step(o.learning_rate, step, g.dtype)
    limit = (
        jnp.sqrt(2 * jnp.asarray(o.trust).astype(g.dtype) / jnp.where(change > 0, change, 1)) / rate
    )
    return jnp.where(change > 0, jnp.minimum(limit, 1), 1)
