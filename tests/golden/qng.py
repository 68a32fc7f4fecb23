"""QNG: a quasi-Newton inverse from the last curvature vectors, without damping.

The second optimizer of Ginger's authors (their repository; not in arXiv 2402.03295), which reaches
the engine through ``scale_by_blocks`` as any method of a user's own does.
``G_t = a G_(t-1) + (1 - a) h_t h_t^T`` from ``G_0 = I`` is kept as a product of rank-one inverse
roots, ``L_t^-1 = a^(-1/2) (I - k q q^T) L_(t-1)^-1``, of which the last tau are remembered.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from kradagrad_jax.curvature.samples import Samples
from kradagrad_jax.engine import scale_by_blocks
from kradagrad_jax.factors.method import BlockMethod, Step
from kradagrad_jax.factors.numbers import at_step
from kradagrad_jax.transforms import sampled
from tests.golden.case import check_keys
from tests.golden.kfac import relative
from tests.x64 import x64

METHODS = ("ginger_qng",)
KEYS = "b1 b2 tau trust_region learning_rate form"


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
      trust: bound on ``lr^2 <sum of gradients, step> / 2``; None: none. Needs ``learning_rate``.
      learning_rate: what the direction is multiplied by: a number or a schedule.
    """

    decay: Any = 0.99
    rank: int = 64
    form: str = "product"
    trust: Any = None
    learning_rate: Any = None


def qng_method(o: QngOptions) -> BlockMethod:
    """The block method, for one long vector; the statistic is ONE curvature vector ``(1, d)``.

    The step uses the curvature of the steps before it.

    Raises:
      ValueError: unknown form, ``trust`` without ``learning_rate``; while tracing, a
        block that is no vector and a statistic of several vectors.
    """
    if o.form not in ("product", "additive"):
        raise ValueError(f"form must be 'product' or 'additive', got {o.form!r}")
    if o.trust is not None and o.learning_rate is None:
        raise ValueError("trust needs learning_rate: the bound is on the step")

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


def _bound(o: QngOptions, total: jax.Array, v: jax.Array, step: Step) -> jax.Array:
    """Factor of the step that keeps it in the trust region; ``total``: the sum of gradients."""
    change = jnp.sum(total * v)
    rate = at_step(o.learning_rate, step, v.dtype)
    bound = jnp.asarray(o.trust).astype(v.dtype)
    limit = jnp.sqrt(2 * bound / jnp.where(change > 0, change, 1)) / rate
    return jnp.where(change > 0, jnp.minimum(limit, 1), 1)


def tolerance_of(raw: dict[str, Any]) -> float:
    return float(raw.get("tolerance", 1e-6))


def qng(options: QngOptions, beta1: float) -> optax.GradientTransformationExtraArgs:
    """All leaves as one vector, sums of gradients, curvature vectors from `curvature=`."""
    return scale_by_blocks(
        qng_method(options),
        layout=dataclasses.replace(sampled.WHOLE, joined=True),
        source=sampled.source("qng", "model", vectors=True),
        graft="none",
        fallback="identity",
        beta1=beta1,
        average="sum",
    )


def errors_of(raw: dict[str, Any]) -> dict[str, float]:
    """Largest relative error of everything that the file records."""
    check_keys(raw["config"], KEYS, raw["source"])
    with x64():
        return _errors(raw)


def _errors(raw: dict[str, Any]) -> dict[str, float]:
    c, inputs, outputs = raw["config"], raw["inputs"], raw["outputs"]
    rate = c["learning_rate"]
    options = QngOptions(c["b2"], c["tau"], c["form"], c.get("trust_region"), rate)
    tx = optax.chain(qng(options, c["b1"]), optax.scale(-rate))

    def arrays(tree: dict[str, Any]) -> dict[str, jax.Array]:
        return {name: jnp.asarray(value, jnp.float64) for name, value in tree.items()}

    params = arrays(inputs["params"])
    state, update = tx.init(params), jax.jit(tx.update)
    worst = {"params": 0.0, "dots": 0.0}
    for t, grads in enumerate(inputs["grads"]):
        samples = Samples.from_gradients(arrays(inputs["curvature_grads"][t]))
        updates, state = update(arrays(grads), state, params, curvature=samples)
        params = optax.apply_updates(params, updates)
        for name, expected in outputs["params"][t].items():
            worst["params"] = max(worst["params"], relative(params[name], np.asarray(expected)))
        (factor,) = state[0].factors.values()
        wanted = np.asarray(outputs["state"][t]["dots"])
        stored = min(t + 1, c["tau"])
        assert int(outputs["state"][t]["length"]) == stored
        ours = np.asarray(factor.lengths)[0, :stored]
        worst["dots"] = max(worst["dots"], relative(ours, wanted[:stored]))
    return worst
